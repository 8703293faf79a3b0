//! The log: one line per happening on stderr, in a form that text from outside can neither forge
//! nor use to reach a terminal.
//!
//! A thread of its own writes it, from a bounded queue: a write to stderr may wait for ever (a pipe
//! that nobody reads, Ctrl-S), and nothing else is to wait with it. Who finds no room in the queue
//! counts the line as lost and goes on.

use crate::clock::{rfc3339, unix_millis};
use std::sync::{OnceLock, atomic::AtomicUsize, atomic::Ordering::SeqCst, mpsc};
use std::{fmt::Arguments, io, io::Write, thread, time::Duration};

/// Lines that wait to be written: 12 MiB at the most, with three texts each.
const QUEUE: usize = 512;
/// So much of a text is logged. It stays far below the 48 KiB at which journald cuts a line in two,
/// and a second half could be made to look like a line of its own.
const LONGEST_TEXT: usize = 8_000;
/// The shortest part of the token that is left out. Fewer characters stand in many a text by
/// chance, and tell nothing.
const SHORTEST_PART: usize = 4;
/// How long the program's end waits for the last lines to be written.
pub const LAST_MOMENT: Duration = Duration::from_millis(150);

static LINES: OnceLock<mpsc::SyncSender<String>> = OnceLock::new();
/// Lines that were not written, and that no line has told of.
static LOST: AtomicUsize = AtomicUsize::new(0);
/// What is left out of every text, escaped as texts are.
static TOKEN: OnceLock<String> = OnceLock::new();

/// Starts the thread that writes. The token is left out of all texts.
pub fn start(token: Option<&String>) -> io::Result<()> {
    let (sender, lines) = mpsc::sync_channel(QUEUE);
    LINES.get_or_init(|| sender);
    if let Some(token) = token {
        TOKEN.get_or_init(|| escape(token.as_bytes()));
    }
    thread::Builder::new().spawn(move || {
        let mut begin = "";
        for line in lines {
            let (lost, now) = (LOST.swap(0, SeqCst), rfc3339(unix_millis()));
            let told = if lost > 0 { format!("{now} lost lines={lost}\n") } else { String::new() };
            // Fails on a full disk, in a file at its size limit, in a closed pipe. Half of it may
            // stand there then, behind which no other line may begin.
            let written = io::stderr().write_all(format!("{begin}{told}{line}").as_bytes());
            begin = if written.is_ok() { "" } else { "\n" };
            if written.is_err() {
                LOST.fetch_add(lost + 1, SeqCst);
            }
        }
    })?;
    Ok(())
}

/// Has `TIME HAPPENING key=value …` written, and does not wait for it.
pub fn line(happening: Arguments) {
    let line = format!("{} {happening}\n", rfc3339(unix_millis()));
    if LINES.get().is_none_or(|lines| lines.try_send(line).is_err()) {
        LOST.fetch_add(1, SeqCst);
    }
}

/// A text from outside, as a value in a line: quoted, with `"`, `\`, controls and all beyond ASCII
/// escaped, and the token as `***`. The beginning of it at the text's end, and the end of it at the
/// text's beginning, are left out, too, since output arrives in pieces.
pub fn quoted(text: &[u8]) -> String {
    let mut text = escape(text);
    if let Some(token) = TOKEN.get() {
        text = text.replace(token, "***");
        for length in (SHORTEST_PART..token.len()).rev() {
            if let Some(start) = text.strip_suffix(&token[..length]) {
                text = format!("{start}***");
            }
            if let Some(end) = text.strip_prefix(&token[token.len() - length..]) {
                text = format!("***{end}");
            }
        }
    }
    let cut = if text.len() > LONGEST_TEXT { "..." } else { "" };
    text.truncate(LONGEST_TEXT);
    format!("\"{text}{cut}\"")
}

/// [`quoted`], for a text that can be written in several ways, by escapes and quotes: as it was
/// `sent`, unless the token stands in what it means, since in what was sent it may be hidden.
pub fn quoted_as_sent(sent: &[u8], meaning: &[u8]) -> String {
    let has_token = TOKEN.get().is_some_and(|token| escape(meaning).contains(token));
    quoted(if has_token { meaning } else { sent })
}

fn escape(text: &[u8]) -> String {
    text.escape_ascii().to_string().replace("\\'", "'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_can_neither_end_its_line_nor_its_quotes() {
        let all: Vec<u8> = (0..=255).collect();
        let quoted = quoted(&all);
        assert!(quoted.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        assert_eq!(quoted.matches('"').count() - quoted.matches("\\\"").count(), 2);
        let quoted = super::quoted(b"a\r\n\x1b[31m\"\\\x7f\xff'");
        assert_eq!(quoted, r#""a\r\n\x1b[31m\"\\\x7f\xff'""#);
    }

    #[test]
    fn the_token_is_left_out_and_long_texts_are_cut() {
        TOKEN.set("s3cret".to_string()).unwrap();
        assert_eq!(quoted(b"s3s3cret, s3cre s3crets"), r#""s3***, s3cre ***s""#);
        assert_eq!(quoted_as_sent(b"%733cret +", b"s3cret  "), r#""***  ""#);
        assert_eq!(quoted_as_sent(b"%733cre +", b"s3cre  "), r#""%733cre +""#);
        // No part of it is left where the text is cut in the middle of it.
        for before in LONGEST_TEXT - 10..LONGEST_TEXT + 10 {
            let text = ["x".repeat(before).as_bytes(), b"s3cret and more"].concat();
            assert!(!quoted(&text).contains("s3"), "{before}");
        }
        let quoted = quoted(&[7; 100_000]);
        assert!(quoted.len() < 48 << 10 && quoted.ends_with("\\x07...\""));
    }
}
