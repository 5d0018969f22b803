"""Pictures and tables of the results files, suite by suite."""
