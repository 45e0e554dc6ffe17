"""From any corpus to clean text files with a manifest: the paper's protocol, or a user's own."""
