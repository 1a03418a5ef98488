"""What running servers say about their placement, read over HTTP and shown in a terminal. Needs no SGLang."""
