//! One file per promise.

mod architecture;
mod export_wire;
