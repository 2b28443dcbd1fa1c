"""What is added to a method so that old knowledge stays: terms of the loss (EWC, LwF). Replay is the data's
(`data.conversations`)."""
