//! Makes cargo look at the migrations again when a file is added or removed;
//! changes of the files themselves it sees without help.

fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
