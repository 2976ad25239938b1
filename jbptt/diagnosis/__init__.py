"""What `jbptt.diagnose` measures, concludes, advises and prints."""
