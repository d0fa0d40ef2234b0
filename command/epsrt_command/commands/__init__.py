"""The subcommands, one file each; what is heavy a command imports when it runs."""
