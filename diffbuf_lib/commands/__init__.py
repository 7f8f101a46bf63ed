"""What the subcommands of `diffbuf` do; `diffbuf_lib.cli` puts them together."""
