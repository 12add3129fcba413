"""What every other part may use: errors for the user, atomic files, devices, timing, progress bars."""
