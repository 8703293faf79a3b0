//! The log: one line per happening on stderr, in a form that text from outside can neither forge nor use to
//! reach a terminal.
//!
//! A thread of its own writes it, from a bounded queue: a write to stderr may wait for ever (a pipe that
//! nobody reads, Ctrl-S), and nothing else is to wait with it. Who finds no room in the queue counts the
//! line as lost and goes on.

use crate::clock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};
use std::{fmt::Arguments, io, io::ErrorKind, io::Write, thread};

/// Lines that wait to be written. With the longest text, 8 MiB.
const QUEUE: usize = 512;
/// So much of a text is logged. Escaped it stays far below the 48 KiB at which journald cuts a line in two,
/// and a second half could be made to look like a line of its own.
const LONGEST_TEXT: usize = 4_000;
/// How long the program's end waits for the last lines.
const LAST_MOMENT: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(1);
const STACK: usize = 64 << 10;

/// A line, its end included, behind one that says how many before it were lost, if any were.
struct Line {
    text: String,
    lost: u64,
}

static LINES: OnceLock<SyncSender<Line>> = OnceLock::new();
/// Lines in the queue, with the one that is being written.
static WAITING: AtomicU64 = AtomicU64::new(0);
/// Lines that were not written, since the last line that said so.
static LOST: AtomicU64 = AtomicU64::new(0);
/// What is left out of every text.
static TOKEN: RwLock<Option<String>> = RwLock::new(None);

/// Starts the thread that writes. The token is left out of all texts from now on.
pub fn start(token: Option<&str>) -> io::Result<()> {
    *TOKEN.write().unwrap_or_else(PoisonError::into_inner) = token.map(str::to_string);
    let (sender, receiver) = sync_channel(QUEUE);
    let builder = thread::Builder::new().stack_size(STACK);
    builder.spawn(move || write_lines(receiver))?;
    let _ = LINES.set(sender);
    Ok(())
}

/// Has `TIME HAPPENING key=value …` written, and does not wait for it.
pub fn line(happening: Arguments) {
    let Some(lines) = LINES.get() else {
        return;
    };
    let time = clock::rfc3339(clock::unix_millis());
    let lost = LOST.swap(0, SeqCst);
    let mut text = format!("{time} {happening}\n");
    if lost > 0 {
        text.insert_str(0, &format!("{time} lost lines={lost}\n"));
    }
    WAITING.fetch_add(1, SeqCst);
    if lines.try_send(Line { text, lost }).is_err() {
        WAITING.fetch_sub(1, SeqCst);
        LOST.fetch_add(lost + 1, SeqCst);
    }
}

/// Gives the lines that wait a moment to be written, and no more.
pub fn finish() {
    let begun = Instant::now();
    while WAITING.load(SeqCst) > 0 && begun.elapsed() < LAST_MOMENT {
        thread::sleep(PAUSE);
    }
}

/// A text from outside, as a value in a line: quoted, with `"`, `\`, controls and all beyond ASCII escaped,
/// the token as `***`.
pub fn quoted(text: &[u8]) -> String {
    // Before it is cut, or a part of the token could be left at the end.
    let mut text = mask(text);
    let is_long = text.len() > LONGEST_TEXT;
    text.truncate(LONGEST_TEXT);
    let escaped = text.escape_ascii().to_string().replace("\\'", "'");
    let cut = if is_long { "..." } else { "" };
    format!("\"{escaped}{cut}\"")
}

/// Whether a text has the token in it.
pub fn has_token(text: &[u8]) -> bool {
    mask(text) != text
}

fn mask(text: &[u8]) -> Vec<u8> {
    let token = TOKEN.read().unwrap_or_else(PoisonError::into_inner);
    let Some(token) = &*token else {
        return text.to_vec();
    };
    let mut masked = Vec::new();
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        if let Some(behind) = rest.strip_prefix(token.as_bytes()) {
            masked.extend_from_slice(b"***");
            rest = behind;
        } else {
            masked.push(first);
            rest = after;
        }
    }
    masked
}

/// Writes line after line, as long as the program lives.
fn write_lines(lines: Receiver<Line>) {
    let mut is_at_line_start = true;
    for mut line in lines {
        if !is_at_line_start {
            // No line may begin behind the half of another.
            line.text.insert(0, '\n');
        }
        let written = write_to_stderr(line.text.as_bytes());
        if written > 0 {
            is_at_line_start = line.text.as_bytes()[written - 1] == b'\n';
        }
        if written < line.text.len() {
            LOST.fetch_add(line.lost + 1, SeqCst);
        }
        WAITING.fetch_sub(1, SeqCst);
    }
}

/// Returns how much could be written: not all to a full disk, a file at its size limit, or a closed pipe.
fn write_to_stderr(bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match io::stderr().write(&bytes[written..]) {
            Ok(length) => written += length,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
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
        let quoted = quoted(&[7; 100_000]);
        assert!(quoted.len() < 48 << 10 && quoted.ends_with("\\x07...\""));
    }
}
