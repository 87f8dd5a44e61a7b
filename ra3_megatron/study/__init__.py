"""Studies: grids of runs that skip what is done, and reports that compare the runs."""
