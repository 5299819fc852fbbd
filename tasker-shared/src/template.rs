//! The template file.
