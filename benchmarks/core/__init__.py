"""What every benchmark needs: configuration, runs and their keys, measures, tables, sweeps."""
