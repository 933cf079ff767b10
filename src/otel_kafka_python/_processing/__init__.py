"""Process spans; the map in the docstring of the package has these modules, too."""
