"""AFOpt's parts: which factors each matrix has, how they are refreshed, the directions."""
