//! The log: one line per happening on stderr, in a form that text from outside can neither forge nor use to reach a terminal.

use crate::clock;
use std::fmt::{Arguments, Display, Formatter, Result, Write as _};
use std::io::Write as _;
use std::sync::OnceLock;

/// A text from outside, for a value in a line: quoted, with `"`, `\`, controls and all beyond ASCII escaped, the token as `***`.
pub struct Quoted<'a>(pub &'a [u8]);

/// So much of a text is logged. Escaped it stays under the 48 KiB at which journald cuts a line in two, and a second half could be
/// made to look like a line of its own.
const LONGEST_TEXT: usize = 8_000;

static TOKEN: OnceLock<String> = OnceLock::new();

/// From now on the token, if there is one, is left out.
pub fn hide(token: Option<&str>) {
    token.map(|token| TOKEN.get_or_init(|| token.to_string()));
}

/// Writes `TIME HAPPENING key=value …` in one call, so that lines do not mix. A closed stderr is no reason to stop.
pub fn line(happening: Arguments) {
    let line = format!("{} {happening}\n", clock::rfc3339(clock::unix_millis()));
    let _ = std::io::stderr().write_all(line.as_bytes());
}

impl Display for Quoted<'_> {
    fn fmt(&self, out: &mut Formatter) -> Result {
        out.write_char('"')?;
        let mut rest = &self.0[..self.0.len().min(LONGEST_TEXT)];
        while let Some((&byte, after)) = rest.split_first() {
            let token = TOKEN.get().map(|token| token.as_bytes());
            let after_token = token.and_then(|token| rest.strip_prefix(token));
            rest = after_token.unwrap_or(after);
            match byte {
                _ if after_token.is_some() => out.write_str("***")?,
                b'"' | b'\\' | b'\n' => write!(out, "{}", byte.escape_ascii())?,
                b' '..=b'~' => out.write_char(byte.into())?,
                _ => write!(out, "\\x{byte:02x}")?,
            }
        }
        let is_cut = self.0.len() > LONGEST_TEXT;
        out.write_str(if is_cut { "...\"" } else { "\"" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_can_neither_end_its_line_nor_its_quotes() {
        let all: Vec<u8> = (0..=255).collect();
        let quoted = Quoted(&all).to_string();
        assert!(quoted.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        assert_eq!(
            quoted.matches('"').count() - quoted.matches("\\\"").count(),
            2
        );
        let quoted = Quoted(b"a\r\n\x1b[31m\"\\\x7f\xff'").to_string();
        assert_eq!(quoted, r#""a\x0d\n\x1b[31m\"\\\x7f\xff'""#);
    }

    #[test]
    fn the_token_is_left_out_and_long_texts_are_cut() {
        hide(Some("s3cret"));
        assert_eq!(
            Quoted(b"s3s3cret, s3cre s3crets").to_string(),
            r#""s3***, s3cre ***s""#
        );
        let quoted = Quoted(&[7; 100_000]).to_string();
        assert!(quoted.len() < 48 << 10 && quoted.ends_with("\\x07...\""));
    }
}
