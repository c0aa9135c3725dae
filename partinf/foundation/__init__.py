"""What every room stands on: errors, ranges of numbers, rounding, and the files of users, of the package and of caches."""
