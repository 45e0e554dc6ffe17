"""Text to tokens: readers and filters, prompts, and the monolingual and parallel token files of the two stages."""
