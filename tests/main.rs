//! One file per promise.

mod export_wire;
