//! Tables for people and JSON for scripts, both on stdout.

use std::io::Write as _;

use chrono::{DateTime, Utc};
use clap::ValueEnum;
use console::{Style, measure_text_width};
use serde::Serialize;
use tasker_shared::redact;

/// The choices of `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For scripts
    Json,
}

/// Writes a line to stdout, without secrets; unlike `println!` it does not panic when the reader is gone.
pub fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    write(&redact::document(text.as_ref()))
}

/// Writes a value as indented JSON, without secrets.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    match redact::shown(&serde_json::to_value(value)?) {
        Some(clean) => write(&serde_json::to_string_pretty(&clean)?),
        // In the order of its fields.
        None => write(&serde_json::to_string_pretty(value)?),
    }
}

fn write(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    Ok(())
}

/// Whether an error is only that the reader of our output has left.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Rows with a heading, columns as wide as they need to be.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these column headings.
    pub fn new<const N: usize>(heading: [&str; N]) -> Self {
        let bold = Style::new().bold();
        Self { rows: vec![heading.map(|text| bold.apply_to(text).to_string()).to_vec()] }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(Vec::from(cells));
    }

    /// The text, without a final line break. Cells may hold colours, but never line breaks.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|at| {
                self.rows.iter().filter_map(|row| row.get(at)).map(|cell| measure_text_width(cell)).max().unwrap_or(0)
            })
            .collect();
        let mut lines = Vec::new();
        for row in &self.rows {
            let mut text = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', width - measure_text_width(cell) + 2));
            }
            lines.push(text.trim_end().to_owned());
        }
        lines.join("\n")
    }

    /// Writes it, or `nothing` when there is no row.
    pub fn print(&self, nothing: &str) -> anyhow::Result<()> {
        if self.rows.len() == 1 {
            return line(nothing);
        }
        line(self.text())
    }
}

/// A public status in its colour.
pub fn status(word: &str) -> String {
    let style = match word {
        "completed" => Style::new().green(),
        "failed" => Style::new().red(),
        "cancelled" | "suspended" => Style::new().yellow(),
        _ => Style::new().cyan(),
    };
    style.apply_to(word).to_string()
}

/// Seconds precision, in UTC.
pub fn time(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S").to_string()
}

/// Nothing shows as a dash; line breaks and other control characters as spaces.
pub fn cell(text: Option<&str>) -> String {
    text.map_or_else(|| "-".into(), |text| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

/// At most `width` characters.
pub fn clip(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_the_cells_hold() {
        let mut table = Table::new(["a", "long heading"]);
        table.row(["wide cell".into(), "x".into()]);
        table.row([cell(None), cell(Some("two\nlines"))]);
        assert_eq!(
            console::strip_ansi_codes(&table.text()),
            "a          long heading\nwide cell  x\n-          two lines"
        );
    }
}
