"""What can be known about a model at one moment: the `Snapshot` and the quantities of the glossary."""
