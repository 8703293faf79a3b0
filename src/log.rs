//! The log: one line per happening on stderr, in a form that text from outside can neither forge nor use to reach a terminal.

use crate::clock;
use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::sync::OnceLock;

/// A line in the making: `TIME HAPPENING key=value …`.
pub struct Line(String);

/// So much of a text is logged. Escaped it stays under the 48 KiB at which journald cuts a line in two, and a second half could be
/// made to look like a line of its own.
const LONGEST_TEXT: usize = 8_000;

static SECRET: OnceLock<Vec<u8>> = OnceLock::new();

/// From now on `token` is written as `***`, wherever it occurs in a text.
pub fn hide(token: &str) {
    // There is one token in a process's life.
    let _ = SECRET.set(token.as_bytes().to_vec());
}

impl Line {
    pub fn new(happening: &str) -> Line {
        Line(format!(
            "{} {happening}",
            clock::rfc3339(clock::unix_millis())
        ))
    }

    /// A value of the program's own: a number, or a word without blanks.
    pub fn value(mut self, key: &str, value: impl Display) -> Line {
        // Writing to a String does not fail.
        let _ = write!(self.0, " {key}={value}");
        self
    }

    /// A text from outside: quoted, with `"`, `\`, controls and all beyond ASCII escaped.
    pub fn text(mut self, key: &str, text: &[u8]) -> Line {
        let _ = write!(self.0, " {key}=\"");
        let mut rest = &text[..text.len().min(LONGEST_TEXT)];
        while let Some((&byte, after)) = rest.split_first() {
            let secret = SECRET.get().filter(|secret| rest.starts_with(secret));
            rest = secret.map_or(after, |secret| &rest[secret.len()..]);
            match byte {
                _ if secret.is_some() => self.0.push_str("***"),
                b'"' | b'\\' => self.0.extend(['\\', byte as char]),
                b'\n' => self.0.push_str("\\n"),
                b' '..=b'~' => self.0.push(byte as char),
                _ => drop(write!(self.0, "\\x{byte:02x}")),
            }
        }
        self.0.push_str(if text.len() > LONGEST_TEXT {
            "...\""
        } else {
            "\""
        });
        self
    }

    /// Writes the line in one call, so that lines do not mix. A closed stderr is no reason to stop.
    pub fn write(mut self) {
        self.0.push('\n');
        let _ = std::io::stderr().write_all(self.0.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_can_neither_end_its_line_nor_its_quotes() {
        let all: Vec<u8> = (0..=255).collect();
        let line = Line(String::new()).text("why", &all).0;
        assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        assert_eq!(line.matches('"').count() - line.matches("\\\"").count(), 2);
        let line = Line(String::new())
            .text("why", b"a\r\n\x1b[31m\"\\\x7f\xff")
            .0;
        assert_eq!(line, r#" why="a\x0d\n\x1b[31m\"\\\x7f\xff""#);
    }

    #[test]
    fn the_token_is_left_out_and_long_texts_are_cut() {
        hide("s3cret");
        assert_eq!(
            Line(String::new())
                .text("why", b"s3s3cret, s3cre s3crets")
                .0,
            r#" why="s3***, s3cre ***s""#
        );
        let line = Line(String::new()).text("out", &[7; 100_000]).0;
        assert!(line.len() < 48 << 10 && line.ends_with("\\x07...\""));
    }
}
