"""Systems side by side: reports, tables, figures, comparison and transfer."""
