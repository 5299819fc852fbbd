//! A Rust source as text: where its comments, strings and tests are.
//!
//! Not a parser: it knows what a lexer knows, and finds the end of an item by its brackets.

/// A source twice, character by character at the same places.
#[derive(Debug, Clone)]
pub struct Source {
    /// Comments are blank.
    code: Vec<char>,
    /// Comments are blank, and so is what stands in strings and characters.
    shape: Vec<char>,
}

impl Source {
    /// Finds the comments and the strings.
    pub fn of(text: &str) -> Self {
        let text: Vec<char> = text.chars().collect();
        let (mut code, mut shape) = (text.clone(), text.clone());
        let mut at = 0;
        while at < text.len() {
            let (end, is_comment) = match text[at] {
                '/' if text.get(at + 1) == Some(&'/') => (line_end(&text, at), true),
                '/' if text.get(at + 1) == Some(&'*') => (block_end(&text, at), true),
                '"' => (string_end(&text, at + 1), false),
                'r' if !follows_word(&text, at) && raw_end(&text, at).is_some() => {
                    (raw_end(&text, at).unwrap_or(at + 1), false)
                }
                'b' | 'c' if !follows_word(&text, at) && raw_end(&text, at + 1).is_some() => {
                    (raw_end(&text, at + 1).unwrap_or(at + 1), false)
                }
                '\'' => (quoted_end(&text, at), false),
                _ => {
                    at += 1;
                    continue;
                }
            };
            let end = end.min(text.len());
            for place in at..end {
                if text[place] != '\n' {
                    if is_comment {
                        code[place] = ' ';
                    }
                    // A string is still something: its quotes stay.
                    if is_comment || (place != at && place + 1 != end) {
                        shape[place] = ' ';
                    }
                }
            }
            at = end.max(at + 1);
        }
        Self { code, shape }
    }

    /// The same with what only tests are built with left out.
    #[must_use]
    pub fn without_tests(mut self) -> Self {
        let mark: Vec<char> = "#[cfg(test)]".chars().collect();
        let mut at = 0;
        while at + mark.len() <= self.shape.len() {
            if self.shape[at..at + mark.len()] != mark[..] {
                at += 1;
                continue;
            }
            let end = item_end(&self.shape, at + mark.len());
            for place in at..end {
                if self.shape[place] != '\n' {
                    self.shape[place] = ' ';
                    self.code[place] = ' ';
                }
            }
            at = end;
        }
        self
    }

    /// Lines that hold more than comments.
    pub fn lines(&self) -> usize {
        let lines = self.code.split(|c| *c == '\n');
        lines.filter(|line| line.iter().any(|c| !c.is_whitespace())).count()
    }

    /// The function in which a line stands, the first line being 1; its attributes belong to it.
    pub fn function_at(&self, line: usize) -> Option<String> {
        let mut line_of = Vec::with_capacity(self.shape.len());
        let mut now = 1;
        for c in &self.shape {
            line_of.push(now);
            now += usize::from(*c == '\n');
        }
        let mut innermost: Option<(usize, String)> = None;
        for at in 0..self.shape.len() {
            if self.shape[at..].starts_with(&['f', 'n', ' ']) && !follows_word(&self.shape, at) {
                let name: String =
                    self.shape[at + 3..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
                let end = item_end(&self.shape, at);
                let first = self.first_line(line_of[at]);
                let is_inside = !name.is_empty() && (first..=line_of[end - 1]).contains(&line);
                if is_inside && innermost.as_ref().is_none_or(|(size, _)| end - at < *size) {
                    innermost = Some((end - at, name));
                }
            }
        }
        innermost.map(|(_, name)| name)
    }

    /// The line of the first attribute of an item.
    fn first_line(&self, item: usize) -> usize {
        let lines: Vec<&[char]> = self.code.split(|c| *c == '\n').collect();
        let is_attribute = |line: usize| {
            let text: String = lines[line - 1].iter().collect();
            text.trim_start().starts_with("#[")
        };
        let mut first = item;
        while first > 1 && is_attribute(first - 1) {
            first -= 1;
        }
        first
    }

    /// Its words and signs: what stands in strings is none of them.
    pub fn tokens(&self) -> Vec<String> {
        let mut tokens: Vec<String> = Vec::new();
        let mut at = 0;
        while at < self.shape.len() {
            let c = self.shape[at];
            if c.is_alphanumeric() || c == '_' {
                let word: String = self.shape[at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
                at += word.chars().count();
                tokens.push(word);
            } else if c == ':' && self.shape.get(at + 1) == Some(&':') {
                tokens.push("::".into());
                at += 2;
            } else {
                if !c.is_whitespace() {
                    tokens.push(c.into());
                }
                at += 1;
            }
        }
        tokens
    }
}

fn follows_word(text: &[char], at: usize) -> bool {
    at > 0 && (text[at - 1].is_alphanumeric() || text[at - 1] == '_')
}

fn line_end(text: &[char], at: usize) -> usize {
    text[at..].iter().position(|c| *c == '\n').map_or(text.len(), |found| at + found)
}

/// Block comments nest.
fn block_end(text: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at + 1 < text.len() {
        match (text[at], text[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The end of a string whose text begins here.
fn string_end(text: &[char], mut at: usize) -> usize {
    while at < text.len() {
        match text[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// The end of a raw string whose `r` is here.
fn raw_end(text: &[char], at: usize) -> Option<usize> {
    let rest = text.get(at..)?.strip_prefix(&['r'])?;
    let hashes = rest.iter().take_while(|c| **c == '#').count();
    if rest.get(hashes) != Some(&'"') {
        return None;
    }
    let mut place = at + 1 + hashes + 1;
    while place < text.len() {
        if text[place] == '"' && text[place + 1..].iter().take_while(|c| **c == '#').count() >= hashes {
            return Some(place + 1 + hashes);
        }
        place += 1;
    }
    Some(text.len())
}

/// The end of a character; of a lifetime, only its quote.
fn quoted_end(text: &[char], at: usize) -> usize {
    match (text.get(at + 1), text.get(at + 2)) {
        (Some('\\'), Some(_)) => {
            text[at + 3..].iter().position(|c| *c == '\'').map_or(text.len(), |found| at + 3 + found + 1)
        }
        (Some(_), Some('\'')) => at + 3,
        _ => at + 1,
    }
}

/// The end of the item that begins here, with further attributes before it.
fn item_end(shape: &[char], from: usize) -> usize {
    let mut at = from;
    loop {
        while at < shape.len() && shape[at].is_whitespace() {
            at += 1;
        }
        if shape.get(at) != Some(&'#') {
            break;
        }
        let open = at + shape[at..].iter().position(|c| *c == '[').unwrap_or(0);
        at = closing(shape, open);
    }
    let rest: String = shape[at..].iter().take(60).collect();
    let mut words = rest.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
    let ends_at_semicolon = words
        .find(|word| !["pub", "crate", "super", "in"].contains(word))
        .is_some_and(|word| ["use", "static", "type", "let", "const"].contains(&word));
    while at < shape.len() {
        match shape[at] {
            ';' => return at + 1,
            '{' if !ends_at_semicolon => return closing(shape, at),
            '{' | '(' | '[' => at = closing(shape, at),
            _ => at += 1,
        }
    }
    shape.len()
}

/// The place behind the bracket that closes the one here.
fn closing(shape: &[char], open: usize) -> usize {
    let mut depth = 0;
    for (place, c) in shape.iter().enumerate().skip(open) {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return place + 1;
        }
    }
    shape.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> usize {
        Source::of(text).without_tests().lines()
    }

    #[test]
    fn comments_and_blank_lines_are_no_code() {
        assert_eq!(lines("//! head\n\nfn a() {} // why\n/* one /* in another */\nstill */\n/// doc\nfn b() {}\n"), 2);
    }

    #[test]
    fn what_looks_like_a_comment_in_a_string_is_code() {
        assert_eq!(
            lines("let a = \"// no\";\nlet b = r#\"/* \" no\"#;\nlet c = b\"\\\" /*\";\nlet d = '\"';\nlet e = 1;"),
            5
        );
        assert_eq!(lines("fn f<'a>(x: &'a str) -> &'a str {\n// a comment\nx }"), 2);
    }

    #[test]
    fn items_for_tests_are_no_code() {
        assert_eq!(lines("fn a() {}\n#[cfg(test)]\nmod tests {\n fn x() { \"}\"; }\n}\nfn b() {}"), 2);
        assert_eq!(lines("#[cfg(test)]\n#[path = \"x.rs\"]\nmod tests;\nfn b() {}"), 1);
        assert_eq!(lines("#[cfg(test)]\nuse a::{b,\n c};\nfn b() {}"), 1);
        assert_eq!(lines("#[cfg(test)]\npub(crate) fn f(\n a: [u8; 2],\n) -> u8 {\n 1 }\nfn b() {}"), 1);
        assert_eq!(lines("#[cfg(feature = \"x\")]\nfn b() {}"), 2);
    }

    #[test]
    fn a_line_stands_in_the_innermost_function() {
        let source = Source::of(
            "#[x(skip)]\nasync fn a(f: fn(u8)) {\n  let c = async || {\n    1 };\n  fn b() {\n  }\n}\n\nfn d();",
        );
        let functions: Vec<Option<String>> = (1..=9).map(|line| source.function_at(line)).collect();
        let a = Some("a".to_owned());
        let b = Some("b".to_owned());
        let expected = [a.clone(), a.clone(), a.clone(), a.clone(), b.clone(), b, a, None, Some("d".to_owned())];
        assert_eq!(functions, expected);
    }

    #[test]
    fn tokens_leave_strings_out() {
        assert_eq!(Source::of("use a::b; \"use c::d\"").tokens(), ["use", "a", "::", "b", ";", "\"", "\""]);
    }
}
