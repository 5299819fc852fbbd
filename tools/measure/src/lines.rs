//! Lines of code of one file: without comments and blanks, and on request without tests.

use std::path::Path;

use crate::source::Source;
use crate::{Error, read};

/// Whether all of a file is tests, by its name or its folder.
pub fn is_test(path: &str) -> bool {
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
    folders.split('/').any(|folder| folder == "tests")
        || name == "tests.rs"
        || name == "properties.rs"
        || name.ends_with("_tests.rs")
}

/// What of a file is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// What users run.
    Product,
    /// Tests, too.
    All,
}

/// Lines of code of a file.
///
/// # Errors
/// If the file cannot be read.
pub fn of(root: &Path, path: &str, counted: Counted) -> Result<usize, Error> {
    let text = read(root, path)?;
    if Path::new(path).extension().is_none_or(|ending| ending != "rs") {
        return Ok(other_lines(path, &text));
    }
    let source = Source::of(&text);
    Ok(match counted {
        Counted::Product if is_test(path) => 0,
        Counted::Product => source.without_tests().lines(),
        Counted::All => source.lines(),
    })
}

/// Of SQL, scripts and style sheets comments of whole lines are told from code.
fn other_lines(path: &str, text: &str) -> usize {
    let comment = match Path::new(path).extension().and_then(|ending| ending.to_str()) {
        Some("sql") => "--",
        Some("sh" | "toml") => "#",
        _ => "//",
    };
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(comment)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_test_by_its_name() {
        for path in ["a/src/x/tests.rs", "a/src/x/properties.rs", "a/src/store_tests.rs", "a/tests/api/main.rs"] {
            assert!(is_test(path), "{path}");
        }
        for path in ["a/src/testing.rs", "a/src/tests_of.rs", "tasker-testing/src/lib.rs"] {
            assert!(!is_test(path), "{path}");
        }
    }

    #[test]
    fn sql_has_comments_of_its_own() {
        assert_eq!(other_lines("a.sql", "-- why\n\nselect 1;\n// 2\n"), 2);
    }
}
