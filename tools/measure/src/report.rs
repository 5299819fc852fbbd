//! The figures as text, and what of them is over its limit.

use std::fmt::Write as _;
use std::path::Path;

use crate::circles::Imports;
use crate::table::{self, Limit};
use crate::{Error, circles, map, packages, read, rooms};

/// How many of the longest files are shown.
const LONGEST: usize = 10;

/// What was measured.
#[derive(Debug, Default)]
pub struct Report {
    /// For a reader.
    pub text: String,
    /// What is over a limit or untrue, a line each.
    pub wrong: Vec<String>,
}

impl Report {
    /// Measures everything but the frames, which a test of `tests/` counts in a running orchestrator.
    ///
    /// # Errors
    /// If a figure cannot be taken.
    pub fn take(root: &Path) -> Result<Self, Error> {
        let mut report = Self::default();
        report.rooms(root)?;
        report.core(root)?;
        report.longest(root)?;
        report.walks(root)?;
        report.circles(root)?;
        report.packages(root)?;
        Ok(report)
    }

    fn line(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    fn row(&mut self, indent: usize, name: &str, figure: usize) {
        let width = 60 - indent;
        let _ = writeln!(self.text, "{:indent$}{name:width$}{figure:>8}", "");
    }

    /// A figure that has a limit.
    fn held(&mut self, figure: usize, limit: &Limit) {
        let _ = writeln!(self.text, "{:60}{figure:>8}   at most {}", limit.what, limit.most);
        if figure > limit.most {
            self.wrong.push(format!("{}: {figure}, at most {}", limit.what, limit.most));
        }
    }

    fn rooms(&mut self, root: &Path) -> Result<(), Error> {
        self.line("LINES OF CODE, without tests, comments and blanks");
        let mut all = 0;
        for room in rooms::rooms(root)? {
            self.row(0, room.name, room.lines);
            for (part, lines) in &room.parts {
                self.row(2, part, *lines);
            }
            all += room.lines;
        }
        self.row(0, "the product", all);
        Ok(())
    }

    fn core(&mut self, root: &Path) -> Result<(), Error> {
        self.line("\nTHE CORE");
        let parts = rooms::core(root)?;
        for (path, lines) in &parts {
            self.row(2, path, *lines);
        }
        self.held(parts.iter().map(|(_, lines)| lines).sum(), &table::CORE_LINES);
        Ok(())
    }

    fn longest(&mut self, root: &Path) -> Result<(), Error> {
        self.line("\nTHE LONGEST FILES, tests included");
        let files = rooms::longest(root)?;
        for (lines, path) in files.iter().take(LONGEST) {
            self.row(2, path, *lines);
        }
        self.held(files.first().map_or(0, |(lines, _)| *lines), &table::FILE_LINES);
        Ok(())
    }

    fn walks(&mut self, root: &Path) -> Result<(), Error> {
        self.line("\nFILES OF THE WALKS of ARCHITECTURE.md");
        let walks = map::walks(&read(root, map::DOCUMENT)?)?;
        for walk in &walks {
            if walk.name == table::RESULT_WALK {
                self.held(walk.files().len(), &table::RESULT_FILES);
            } else {
                self.row(0, &walk.name, walk.files().len());
            }
            self.wrong.extend(map::untrue(root, walk));
        }
        if !walks.is_empty() && walks.iter().all(|walk| walk.name != table::RESULT_WALK) {
            self.wrong.push(format!("{} has no walk {:?}", map::DOCUMENT, table::RESULT_WALK));
        }
        Ok(())
    }

    fn circles(&mut self, root: &Path) -> Result<(), Error> {
        self.line("\nCIRCLES: files of a crate that import each other, and rooms");
        let (mut of_files, mut of_rooms) = (0, 0);
        for member in table::PRODUCT {
            let imports = circles::imports(root, member)?;
            for circle in circles::circles(&imports) {
                of_files += 1;
                self.circle(&format!("circle {of_files} of files"), circle);
            }
            for circle in circles::circles(&circles::between_rooms(member, &imports)) {
                of_rooms += 1;
                self.circle(&format!("circle {of_rooms} of rooms"), circle);
            }
        }
        self.held(of_files, &table::CIRCLES);
        self.held(of_rooms, &table::ROOM_CIRCLES);
        Ok(())
    }

    fn circle(&mut self, title: &str, circle: Imports) {
        self.line(&format!("  {title}"));
        for ((from, to), names) in circle {
            let names: Vec<String> = names.into_iter().collect();
            self.line(&format!("    {from} -> {to}: {}", names.join(", ")));
        }
    }

    fn packages(&mut self, root: &Path) -> Result<(), Error> {
        self.line("\nPACKAGES");
        self.held(packages::of(root, table::WORKER)?.len(), &table::WORKER_PACKAGES);
        Ok(())
    }
}
