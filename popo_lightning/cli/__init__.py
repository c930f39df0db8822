"""The `popo` command: parser, sentences about wrong settings, and the order of a run's parts."""
