"""The top floor: runs the study on real text and shows it as pictures, tables and sentences."""
