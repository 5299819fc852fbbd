//! What someone who writes a worker has to compile.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::Error;

/// The packages that a package needs to run, itself among them.
///
/// # Errors
/// If cargo does not know the package.
pub fn of(root: &Path, package: &str) -> Result<BTreeSet<String>, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--locked", "-p", package, "-e", "normal", "--prefix", "none"])
        .current_dir(root)
        .output()
        .map_err(|error| Error(format!("cargo tree: {error}")))?;
    if !output.status.success() {
        return Err(Error(format!("cargo tree -p {package}: {}", String::from_utf8_lossy(&output.stderr))));
    }
    Ok(distinct(&String::from_utf8_lossy(&output.stdout)))
}

/// Name and version; what cargo adds about a line says nothing about the package.
fn distinct(tree: &str) -> BTreeSet<String> {
    let name = |line: &str| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    tree.lines().filter(|line| !line.trim().is_empty()).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_counts_once() {
        let tree = "a v1.0.0 (/x)\nb v1.0.0\nserde_derive v1.0.0 (proc-macro)\nb v1.0.0 (*)\nb v2.0.0\n\n";
        assert_eq!(distinct(tree).len(), 4);
    }
}
