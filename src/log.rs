//! The log: one line per happening on stderr, in a form that text from outside can neither forge nor use to reach a terminal.

use crate::clock;
use std::{fmt::Arguments, io::Write, sync::OnceLock};

/// So much of a text is logged. Escaped it stays under the 48 KiB at which journald cuts a line in two, and a second half could be
/// made to look like a line of its own.
const LONGEST_TEXT: usize = 8_000;

/// The token, once there is one: it is left out.
pub static TOKEN: OnceLock<String> = OnceLock::new();

/// Writes `TIME HAPPENING key=value …` in one call, so that lines do not mix. A closed stderr is no reason to stop.
pub fn line(happening: Arguments) {
    let line = format!("{} {happening}\n", clock::rfc3339(clock::unix_millis()));
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// A text from outside, for a value in a line: quoted, with `"`, `\`, controls and all beyond ASCII escaped, the token as `***`.
pub fn quoted(text: &[u8]) -> String {
    let escape = |text: &[u8]| text.escape_ascii().to_string().replace("\\'", "'");
    let mut quoted = escape(&text[..text.len().min(LONGEST_TEXT)]);
    if let Some(token) = TOKEN.get() {
        quoted = quoted.replace(&escape(token.as_bytes()), "***");
    }
    let cut = if text.len() > LONGEST_TEXT { "..." } else { "" };
    format!("\"{quoted}{cut}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_can_neither_end_its_line_nor_its_quotes() {
        let all: Vec<u8> = (0..=255).collect();
        let quoted = quoted(&all);
        assert!(quoted.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        assert_eq!(
            quoted.matches('"').count() - quoted.matches("\\\"").count(),
            2
        );
        let quoted = super::quoted(b"a\r\n\x1b[31m\"\\\x7f\xff'");
        assert_eq!(quoted, r#""a\r\n\x1b[31m\"\\\x7f\xff'""#);
    }

    #[test]
    fn the_token_is_left_out_and_long_texts_are_cut() {
        TOKEN.set("s3cret".to_string()).unwrap();
        assert_eq!(quoted(b"s3s3cret, s3cre s3crets"), r#""s3***, s3cre ***s""#);
        let quoted = quoted(&[7; 100_000]);
        assert!(quoted.len() < 48 << 10 && quoted.ends_with("\\x07...\""));
    }
}
