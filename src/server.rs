//! The accept loop, the connection cap, the shutdown, and the path of one connection.

use crate::child::{Child, Feed, thread_builder};
use crate::listener::{Connection, Input, Listener};
use crate::log::{self, Quoted};
use crate::output::{Format, Stream};
use crate::request::{Answer, Head, Request, Result, form_value};
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
    let (null, runs) = (File::open("/dev/null")?, Arc::default());
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
    fn turn_away(&self, pause: Duration) {
        let answer = Answer::Busy("no place for another connection");
        self.reply(&Head::default(), &answer, true);
        self.linger(pause);
    }

    /// The requests of the connection, one after the other.
    fn converse(&self) {
        let mut request = Request::new(Input::new(self.1.clone()));
        request.input.get_mut().allow(REQUEST_TIME);
        while let Some(mut next) = self.exchange(request) {
            next.input.get_mut().allow(IDLE_TIME);
            if next.input.fill_buf().map_or(true, <[u8]>::is_empty) {
                return;
            }
            next.input.get_mut().allow(REQUEST_TIME);
            request = next;
        }
    }

    /// A request and its answer. Gives the input back where another request may follow.
    fn exchange(&self, request: Feed) -> Option<Feed> {
        let mut request = Some(request);
        let order = self.check(request.as_mut()?);
        let mut close = request.as_ref()?.head.wants_close();
        if let Err(answer) = order.and_then(|order| self.run(&order, &mut request)) {
            let request = request.as_ref().filter(|_| answer != Answer::Gone)?;
            // Whether a client that was not told to go on sends its content all the same cannot be known.
            close |= request.awaits_continue || request.left > MOST_SKIPPED;
            close |= response::ends_connection(&answer);
            self.reply(&request.head, &answer, close);
        }
        let open = request.filter(|_| !close && sys::signals() == 0);
        let next = open.and_then(skip_content);
        if next.is_none() {
            self.linger(LINGER_PAUSE);
        }
        next
    }

    /// Reads a request and checks it, in the order in which answers take precedence.
    fn check(&self, request: &mut Feed) -> Result<Order> {
        request.read_head()?;
        if request.begins_malformed(request.input.buffer()) {
            return Err(Answer::Malformed("malformed chunk"));
        }
        let (policy, head) = (&self.0.config.policy, &request.head);
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
            true => policy.command(&self.read_form(request)?)?,
            false => policy.command(query)?,
        };
        if gets { Ok(order) } else { Err(Answer::Head(format)) }
    }

    /// Content that is a form.
    fn read_form(&self, request: &mut Feed) -> Result<Vec<u8>> {
        let mut form = Vec::new();
        if request.left <= LARGEST_FORM && take(&mut request.awaits_continue) {
            self.write(CONTINUE);
        }
        request.input.get_mut().allow(REQUEST_TIME);
        while request.left.saturating_add(form.len() as u64) <= LARGEST_FORM {
            let piece = request.piece()?;
            form.extend_from_slice(piece);
            match piece.len() {
                0 => return Ok(form),
                length => request.take(length),
            }
        }
        Err(Answer::FormTooLarge)
    }

    /// Runs a command and streams it. A request's content, if there is any, is its standard input.
    fn run(&self, order: &Order, request: &mut Option<Feed>) -> Result<()> {
        let Conversation(server, connection) = self;
        let _counted = server.runs.clone();
        fence(SeqCst);
        if sys::signals() > 0 {
            return Err(Answer::Busy("the server is shutting down"));
        }
        let Request { head, awaits_continue, .. } = request.as_ref().ok_or(Answer::Gone)?;
        let format = format_for(head);
        let mut start = if *awaits_continue { CONTINUE.to_vec() } else { Vec::new() };
        start.extend(self.manner(head, head.wants_close()).stream(format));
        let mut feed = request.take_if(|it| it.head.method == "POST" && !it.is_at_end());
        let child = Child::start(&order.words, &server.null, &mut feed, format);
        *request = request.take().or(feed);
        let child = child?;
        let (peer, pid, command) = (&connection.peer, child.pid(), Quoted(&order.line));
        log::line(format_args!("run peer={peer} pid={pid} command={command}"));
        let stream = Stream::new(format, start);
        let (complete, feed) = run::run(child, connection, &server.config.limits, stream);
        *request = request.take().or(feed);
        if complete { Ok(()) } else { Err(Answer::Gone) }
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
        Manner { close, head_only: head.method == "HEAD", foreign_origin }
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
    Format { events: !plain, chunked: head.minor > 0 }
}

/// Reads what is left of a request's content, if that is not too much: the next request comes after it.
fn skip_content(mut request: Feed) -> Option<Feed> {
    request.input.get_mut().allow(REQUEST_TIME);
    let mut skipped = 0;
    while skipped <= MOST_SKIPPED {
        let length = request.piece().ok()?.len();
        if length == 0 {
            return Some(request);
        }
        request.take(length);
        skipped += length as u64;
    }
    None
}
