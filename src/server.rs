//! The accept loop, the connection cap, the shutdown, and the path of one connection.

use crate::child::{Child, Feed, Feeder, exhausted, thread_builder};
use crate::listener::{Connection, Input, Listener};
use crate::log::{self, Quoted};
use crate::output::{Format, Stream};
use crate::request::{Answer, Content, Head, Result, form_value};
use crate::response::{self, CONTINUE, Manner, PAGE_METHODS, RUN_METHODS};
use crate::run::{self, TICK};
use crate::{config::Config, policy::Order, sys};
use std::io::{self, prelude::*};
use std::sync::atomic::{Ordering::SeqCst, fence};
use std::time::{Duration, Instant};
use std::{fs::File, mem::take, net::Shutdown, sync::Arc, thread};

/// In which a head must have arrived whole, and a form; however it trickles.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long a connection waits for its next request.
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Content that nobody asked for is read up to here, so that the connection can go on.
const MOST_SKIPPED: u64 = 1 << 20;
const LARGEST_FORM: u64 = 64 << 10;
/// How long a client that was told that the connection ends may pause in sending; fifteen times that it may go on.
const LINGER_PAUSE: Duration = Duration::from_secs(2);
/// `accept` fails at once as long as descriptors are out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Clients beyond the cap that are being told so.
const MOST_REFUSED: usize = 256;
/// What the server's end may take beyond `--grace`, and after a second signal.
const AFTER_GRACE: Duration = Duration::from_millis(900);
const AFTER_SECOND_SIGNAL: Duration = Duration::from_millis(400);

struct Server {
    config: Config,
    /// Standard input of commands without content.
    null: File,
    /// Held by each command that is about to start, or has not ended.
    runs: Arc<()>,
}

/// A connection that is served. The server is held by each, and by the accepting thread.
struct Conversation(Arc<Server>, Arc<Connection>);

/// Serves until a signal ends the server, and every command has ended.
pub fn serve(listener: &Listener, config: Config) -> io::Result<()> {
    // An empty root has no such file; a pipe that nobody writes to reads the same.
    let null = File::open("/dev/null").or_else(|_| sys::pipe().map(|(end, _)| end.into()))?;
    let runs = Arc::default();
    let server = Arc::new(Server { config, null, runs });
    let spare = || server.null.try_clone().ok();
    // Given up when descriptors are out, so that a client more can be told so.
    let mut reserve = spare();
    while sys::signals() == 0 {
        if let Ok(connection) = listener.accept(TICK, server.config.limits.stall) {
            reserve = reserve.or_else(spare);
            start_conversation(&server, Arc::new(connection));
        } else if reserve.take().is_none() {
            thread::sleep(ACCEPT_PAUSE);
            reserve = spare();
        }
    }
    log::line(format_args!("shutdown"));
    wait_for_runs(&server);
    Ok(())
}

/// Serves a connection in a thread of its own, or says in one that there are too many.
fn start_conversation(server: &Arc<Server>, connection: Arc<Connection>) {
    let others = Arc::strong_count(server) - 1;
    let most = server.config.max_connections;
    let conversation = || Conversation(server.clone(), connection.clone());
    let own = conversation();
    let converse = move || match others < most {
        true => own.converse(),
        false => own.turn_away(LINGER_PAUSE),
    };
    if others >= most + MOST_REFUSED || thread_builder().spawn(converse).is_err() {
        conversation().turn_away(ACCEPT_PAUSE);
    }
}

/// Waits for the commands to end, which they do by themselves once a signal has come.
fn wait_for_runs(server: &Server) {
    let mut deadline = Instant::now() + server.config.limits.grace + AFTER_GRACE;
    // Pairs with the fence of a run: it sees the signal, or this sees the run.
    fence(SeqCst);
    while Arc::strong_count(&server.runs) > 1 && Instant::now() < deadline {
        if sys::signals() > 1 {
            deadline = deadline.min(Instant::now() + AFTER_SECOND_SIGNAL);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

impl Conversation {
    /// Waits for the request before it refuses it: nginx mixes an answer that precedes its request with the next instance's, and says 502.
    fn turn_away(&self, pause: Duration) {
        sys::ready(&self.1.socket, sys::POLLIN, pause.as_millis() as i32);
        let answer = Answer::Busy("no place for another connection");
        self.reply(&Head::default(), &answer, true);
        self.linger(pause);
    }

    /// The requests of the connection, one after the other.
    fn converse(&self) {
        let mut content = Content::new(Input::new(self.1.clone()));
        content.input.get_mut().allow(REQUEST_TIME);
        while let Some(mut next) = self.exchange(content) {
            next.input.get_mut().allow(IDLE_TIME);
            if next.input.fill_buf().map_or(true, <[u8]>::is_empty) {
                return;
            }
            next.input.get_mut().allow(REQUEST_TIME);
            content = next;
        }
    }

    /// A request and its answer. Gives the input back where another request may follow.
    fn exchange(&self, mut content: Feed) -> Option<Feed> {
        let mut head = Head::default();
        let order = self.check(&mut head, &mut content);
        let mut close = head.wants_close();
        let mut content = Some(content);
        if let Err(answer) = order.and_then(|order| self.run(&order, &head, &mut content)) {
            if answer == Answer::Gone {
                return None;
            }
            let is_long = |rest: &Feed| rest.awaits_continue || rest.left > MOST_SKIPPED;
            // Whether a client that was not told to go on sends its content all the same cannot be known.
            close |= response::ends_connection(&answer) || content.as_ref().is_none_or(is_long);
            self.reply(&head, &answer, close);
        }
        let next = content
            .filter(|_| !close && sys::signals() == 0)
            .and_then(skip_content);
        if next.is_none() {
            self.linger(LINGER_PAUSE);
        }
        next
    }

    /// Reads a request and checks it, in the order in which answers take precedence.
    fn check(&self, head: &mut Head, content: &mut Feed) -> Result<Order> {
        content.read_head(head)?;
        if content.begins_malformed(content.input.buffer()) {
            return Err(Answer::Malformed("malformed chunk"));
        }
        let policy = &self.0.config.policy;
        let (path, method) = (head.path.as_str(), head.method.as_str());
        policy.host(head, self.1.local)?;
        if path != "/" || !matches!(method, "GET" | "HEAD") {
            policy.browser(head)?;
        }
        let methods = match path {
            "/" => PAGE_METHODS,
            "/run" | "*" => RUN_METHODS,
            _ => return Err(Answer::NoSuchPath),
        };
        match (path, method) {
            (_, "OPTIONS") => return Err(Answer::Options(methods)),
            ("/", "GET" | "HEAD") => return Err(Answer::Page),
            ("/run", "GET" | "HEAD" | "POST") => {}
            (_, "GET" | "HEAD" | "POST") => return Err(Answer::Method(methods)),
            _ => return Err(Answer::UnknownMethod),
        }
        policy.token(head)?;
        if !head.all("last-event-id").is_empty() {
            return Err(Answer::Repeated);
        }
        let (query, format) = (head.query.as_bytes(), format_for(head));
        let (gets, posts) = (method != "HEAD", method == "POST");
        let order = match posts && form_value(query, b"command")?.is_none() {
            true => policy.command(&self.read_form(content)?)?,
            false => policy.command(query)?,
        };
        if gets {
            Ok(order)
        } else {
            Err(Answer::Head(format))
        }
    }

    /// Content that is a form.
    fn read_form(&self, content: &mut Feed) -> Result<Vec<u8>> {
        let mut form = Vec::new();
        if content.left <= LARGEST_FORM && take(&mut content.awaits_continue) {
            self.write(CONTINUE);
        }
        content.input.get_mut().allow(REQUEST_TIME);
        while content.left.saturating_add(form.len() as u64) <= LARGEST_FORM {
            let piece = content.piece()?;
            form.extend_from_slice(piece);
            match piece.len() {
                0 => return Ok(form),
                length => content.take(length),
            }
        }
        Err(Answer::FormTooLarge)
    }

    /// Runs a command and streams it. The content of a POST is its standard input.
    fn run(&self, order: &Order, head: &Head, content: &mut Option<Feed>) -> Result<()> {
        let Conversation(server, connection) = self;
        let _counted = server.runs.clone();
        fence(SeqCst);
        if sys::signals() > 0 {
            return Err(Answer::Busy("the server is shutting down"));
        }
        let format = format_for(head);
        let awaits_continue = content
            .as_ref()
            .is_some_and(|content| content.awaits_continue);
        let mut start = if awaits_continue {
            CONTINUE.to_vec()
        } else {
            Vec::new()
        };
        start.extend(self.manner(head, head.wants_close()).stream(format));
        let (feeder, stdin) = match content.take_if(|it| head.method == "POST" && !it.is_at_end()) {
            Some(content) => Feeder::start(content).map(|(feeder, end)| (Some(feeder), end))?,
            None => (None, server.null.try_clone().map_err(exhausted)?.into()),
        };
        let done = Child::start(&order.words, stdin, format).and_then(|child| {
            let (limits, stream) = (&server.config.limits, Stream::new(format, start));
            run::run(
                &order.line,
                child,
                feeder.as_ref(),
                connection,
                limits,
                stream,
            )
        });
        *content = content.take().or(feeder.and_then(Feeder::end));
        done
    }

    /// Answers with anything but a command's output.
    fn reply(&self, head: &Head, answer: &Answer, close: bool) {
        let (status, why) = response::explain(answer);
        if !why.is_empty() {
            let (peer, code) = (&self.1.peer, &status[..3]);
            let (target, why) = (Quoted(head.target.as_bytes()), Quoted(why.as_bytes()));
            let answer = format!("status={code} target={target} why={why}");
            log::line(format_args!("refuse peer={peer} {answer}"));
        }
        self.write(&self.manner(head, close).render(answer));
    }

    fn manner<'a>(&self, head: &'a Head, close: bool) -> Manner<'a> {
        let foreign_origin = self.0.config.policy.foreign_origin(head);
        Manner {
            close,
            head_only: head.method == "HEAD",
            foreign_origin,
        }
    }

    /// Writes an answer whole, unless the client is gone or does not read, as the next read will tell.
    fn write(&self, mut bytes: &[u8]) {
        let deadline = Instant::now() + self.0.config.limits.stall;
        while !bytes.is_empty() && Instant::now() < deadline {
            match (&self.1.socket).write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if run::is_passing(&error) => {}
                Err(_) => return,
            }
        }
    }

    /// Says that nothing more comes, and reads what still does, until the client pauses: closing a socket with unread input would send
    /// a reset, which can eat the answer on its way (RFC 9112 section 9.6).
    fn linger(&self, pause: Duration) {
        let mut socket = &self.1.socket;
        let _ = socket.shutdown(Shutdown::Write);
        let _ = socket.set_read_timeout(Some(pause));
        let deadline = Instant::now() + pause * 15;
        let mut sink = [0; 4096];
        while Instant::now() < deadline && socket.read(&mut sink).is_ok_and(|length| length > 0) {}
    }
}

/// Events, unless plain text is asked for and they are not (RFC 9110 section 12.5.1).
fn format_for(head: &Head) -> Format {
    let plain = head.lists("accept", "text/plain") && !head.lists("accept", "text/event-stream");
    Format {
        events: !plain,
        chunked: head.minor > 0,
    }
}

/// Reads what is left of a request's content, if that is not too much: the next request comes after it.
fn skip_content(mut content: Feed) -> Option<Feed> {
    content.input.get_mut().allow(REQUEST_TIME);
    let mut skipped = 0;
    while skipped <= MOST_SKIPPED {
        let length = content.piece().ok()?.len();
        if length == 0 {
            return Some(content);
        }
        content.take(length);
        skipped += length as u64;
    }
    None
}
