//! Attempt + policy -> delay.
