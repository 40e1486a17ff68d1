"""Time series: tables of numbers, cut into windows."""
