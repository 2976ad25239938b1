"""With which window should I train? Answered by training: tuned rates, paired seeds, intervals."""
