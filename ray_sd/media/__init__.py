"""Pictures and videos as bytes and files: decoded within bounds, written with how they were made, laid out on sheets."""
