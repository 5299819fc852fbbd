//! What JSON Schema cannot express of a value: the formats that the schema of a template names.

use super::suggestions::shown;
use super::yaml::{Kind, Node};
use crate::state_machine::duration::{format_duration, parse_duration};
use crate::state_machine::graph::{GraphError, MAX_STEPS};

/// Looks at one value; the error is what is wrong with it and what to write instead. A value of
/// another kind is left to the check of its type, unless the format has a better message.
pub(super) type Check = fn(&Node) -> Result<(), String>;

/// Every format, by its name in the schema.
pub(super) const FORMATS: [(&str, Check); 6] = [
    ("tasker-duration", duration),
    ("tasker-lease", lease),
    ("tasker-limit", limit),
    ("tasker-steps", steps),
    ("tasker-time", time),
    ("tasker-version", version),
];

/// Workers renew a lease three times in its length.
const SHORTEST_LEASE: std::time::Duration = std::time::Duration::from_secs(1);

fn read_duration(node: &Node) -> Result<std::time::Duration, String> {
    let text = match &node.kind {
        Kind::Text(text) => text.clone(),
        Kind::Number(number) => number.to_string(),
        _ => return Err(format!("is {}, not a duration such as 30s", node.kind_name())),
    };
    parse_duration(&text).map_err(|message| format!("`{}` {message}", shown(&text)))
}

fn duration(node: &Node) -> Result<(), String> {
    read_duration(node).map(drop)
}

fn lease(node: &Node) -> Result<(), String> {
    if read_duration(node)? < SHORTEST_LEASE {
        return Err(format!("must be at least {}; workers renew it three times", format_duration(SHORTEST_LEASE)));
    }
    Ok(())
}

fn limit(node: &Node) -> Result<(), String> {
    match &node.kind {
        Kind::Number(number) if number.as_i64() == Some(0) => {
            Err("0 would let nothing run, ever; pause the queue with `tasker queue pause` instead".to_owned())
        }
        _ => Ok(()),
    }
}

/// Before the steps are looked at: their other problems would bury this one.
fn steps(node: &Node) -> Result<(), String> {
    match &node.kind {
        Kind::List(items) if items.len() > MAX_STEPS => {
            Err(GraphError::TooManySteps { count: items.len() }.to_string())
        }
        _ => Ok(()),
    }
}

/// A pattern does not know how many days a month has. Anything else is left to the pattern.
fn time(node: &Node) -> Result<(), String> {
    match &node.kind {
        Kind::Text(text) if text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains("${") => {
            chrono::DateTime::parse_from_rfc3339(text)
                .map(drop)
                .map_err(|_| format!("`{}` is not a time; write it as 2030-01-31T12:00:00Z", shown(text)))
        }
        _ => Ok(()),
    }
}

fn version(node: &Node) -> Result<(), String> {
    match &node.kind {
        Kind::Number(_) => Err("is a number, in which 1.10 and 1.1 are the same; put it in quotes".to_owned()),
        _ => Ok(()),
    }
}
