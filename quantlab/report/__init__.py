"""What a person sees of a run; reads the run folder's files and needs no torch."""
