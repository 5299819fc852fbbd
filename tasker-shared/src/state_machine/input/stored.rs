//! The input as it is stored: a large value that a reference brought in whole is named, not copied.

use serde_json::{Value, json};

use super::reference::{Root, Segment};
use super::{InputTemplate, Part, take_bytes};

/// A value of more bytes than this is not copied into the inputs that read it: they name it.
pub const MAX_INLINE_BYTES: usize = 64 * 1024;

/// The key by which a stored input says that parts of it are kept elsewhere; `tasker.resolve_input`
/// puts them back when the step is claimed.
pub const BY_REFERENCE: &str = "$tasker.by_reference";

/// The input as it is stored: large values that references brought in whole are left out and
/// named, `{"$tasker.by_reference": [{at, step, path}], "input": …}`. Without any it is stored as it is.
///
/// `template` is the one that the input was resolved with, `None` for [`default_input`](super::default_input).
pub fn stored_input(template: Option<&InputTemplate>, mut input: Value) -> Value {
    let mut left_out = Vec::new();
    if let Some(template) = template {
        leave_out(&template.root, &mut input, &mut Vec::new(), &mut left_out);
    } else if let Value::Object(parts) = &mut input {
        for (part, value) in parts.iter_mut() {
            match (part.as_str(), value) {
                ("input", value) if is_large(value) => {
                    left_out.push(json!({"at": ["input"], "step": null, "path": []}));
                    *value = Value::Null;
                }
                ("steps", Value::Object(outputs)) => {
                    for (step, output) in outputs.iter_mut().filter(|(_, output)| is_large(output)) {
                        left_out.push(json!({"at": ["steps", step], "step": step, "path": []}));
                        *output = Value::Null;
                    }
                }
                _ => {}
            }
        }
    }
    // An input that happens to have our key is wrapped as well, so that it is never misread.
    if left_out.is_empty() && input.get(BY_REFERENCE).is_none() {
        return input;
    }
    json!({BY_REFERENCE: left_out, "input": input})
}

fn is_large(value: &Value) -> bool {
    !take_bytes(value, &mut { MAX_INLINE_BYTES })
}

/// Walks a template and what it was resolved to side by side.
fn leave_out(part: &Part, value: &mut Value, at: &mut Vec<Segment>, left_out: &mut Vec<Value>) {
    match (part, value) {
        (Part::List(parts), Value::Array(items)) => {
            for (index, (part, item)) in parts.iter().zip(items).enumerate() {
                at.push(Segment::Index(index));
                leave_out(part, item, at, left_out);
                at.pop();
            }
        }
        (Part::Map(parts), Value::Object(map)) => {
            for (key, part) in parts {
                if let Some(item) = map.get_mut(key) {
                    at.push(Segment::Key(key.clone()));
                    leave_out(part, item, at, left_out);
                    at.pop();
                }
            }
        }
        (Part::Whole(reference), value) if is_large(value) => {
            let step = match &reference.root {
                Root::Input => None,
                Root::Step(step) => Some(step),
                // An item is nobody's output: its copy is the only one.
                Root::Item | Root::ItemIndex => return,
            };
            left_out.push(json!({"at": words(at), "step": step, "path": words(&reference.path)}));
            *value = Value::Null;
        }
        _ => {}
    }
}

/// A path as PostgreSQL writes one.
fn words(path: &[Segment]) -> Vec<String> {
    path.iter()
        .map(|segment| match segment {
            Segment::Key(key) => key.clone(),
            Segment::Index(index) => index.to_string(),
        })
        .collect()
}
