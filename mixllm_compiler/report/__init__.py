"""What people look at: tables for the terminal, plots, documentation made from the code."""
