//! What the tests of the product's promises share.

pub mod receiver;
