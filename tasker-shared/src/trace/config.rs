//! Where traces go: flags, environment, defaults.
