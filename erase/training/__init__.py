"""Training under a mask: the loop, the masked optimizer and its compiled update, adapters."""
