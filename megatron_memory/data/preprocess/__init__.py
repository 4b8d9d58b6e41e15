"""Text files to token files: `sources` read, `encoding` tokenizes, `workers` spread the work,
`outputs` write, `pipeline` joins them."""
