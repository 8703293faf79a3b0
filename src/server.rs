//! The accept loop, the connection cap, the shutdown, and the path of one connection.

use crate::child::{Child, Failure, Feed, thread_builder};
use crate::config::Config;
use crate::listener::{Connection, Input, Listener};
use crate::log::Line;
use crate::request::{Content, Refusal, Request, form_value};
use crate::response::{self, Answer, CONTINUE, Format, PAGE_METHODS, RUN_METHODS};
use crate::run::{self, Client, TICK};
use crate::sys;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// In which a head must have arrived whole, and a form; however it trickles.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long a connection waits for its next request.
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Content that nobody asked for is read up to here, so that the connection can go on.
const MOST_SKIPPED: u64 = 1 << 20;
const LARGEST_FORM: usize = 64 << 10;
/// How long a client that was refused may go on sending before its connection is closed on it, and how long it may pause.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_PAUSE: Duration = Duration::from_secs(2);
/// `accept` fails at once as long as descriptors are out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What the server's end may take beyond `--grace`, and after a second signal.
const AFTER_GRACE: Duration = Duration::from_millis(900);
const AFTER_SECOND_SIGNAL: Duration = Duration::from_millis(400);
/// Connections that wait to be turned away, and for their clients to have read so.
const MOST_PARTING: usize = 256;

struct Server {
    config: Config,
    /// Standard input of commands without content.
    null: File,
    /// Commands that are about to start, or have not ended.
    runs: AtomicUsize,
}

/// What a request that passed every check asks for.
enum Wanted {
    Page,
    Options(&'static str),
    Run(Vec<Vec<u8>>),
}

/// Serves until a signal ends the server, and every command has ended.
pub fn serve(listener: &Listener, config: Config) -> io::Result<()> {
    let null = File::open("/dev/null")?;
    let server = Arc::new(Server {
        config,
        null,
        runs: AtomicUsize::new(0),
    });
    let (refused, to_refuse) = sync_channel(MOST_PARTING);
    thread_builder().spawn(move || turn_away(&to_refuse))?;
    accept_connections(&server, listener, &refused);
    Line::new("shutdown").write();
    server.wait_for_runs();
    Ok(())
}

fn accept_connections(
    server: &Arc<Server>,
    listener: &Listener,
    refused: &SyncSender<Arc<Connection>>,
) {
    let spare = || server.null.try_clone().ok();
    // Given up when descriptors are out, so that a client more can be told so.
    let mut reserve = spare();
    while sys::signals() == 0 {
        let Ok(connection) = listener.accept(TICK, server.config.limits.stall) else {
            if reserve.take().is_none() {
                thread::sleep(ACCEPT_PAUSE);
                reserve = spare();
            }
            continue;
        };
        reserve = reserve.or_else(spare);
        let connection = Arc::new(connection);
        if !server.converse_in_thread(connection.clone()) {
            const WHY: &str = "no place for another connection";
            log_refusal(&connection, "", &Refusal::Busy(WHY));
            // A flood that outruns the thread that turns away is cut off.
            let _ = refused.try_send(connection);
        }
    }
}

/// Tells clients that there is no place for them, and keeps each connection until its client has read so, or long enough.
fn turn_away(refused: &Receiver<Arc<Connection>>) {
    let answer = Answer {
        close: true,
        ..Answer::default()
    };
    let mut parting: Vec<(Instant, Arc<Connection>)> = Vec::new();
    loop {
        let patience = if parting.is_empty() {
            LINGER
        } else {
            ACCEPT_PAUSE
        };
        match refused.recv_timeout(patience) {
            Ok(connection) => {
                let _ = connection.socket.set_nonblocking(true);
                let _ = (&connection.socket)
                    .write(&answer.refusal(&Refusal::Busy("too many connections")));
                let _ = connection.socket.shutdown(Shutdown::Write);
                parting.truncate(MOST_PARTING);
                parting.push((Instant::now(), connection));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let is_open = |socket: &mut &TcpStream| match socket.read(&mut [0; 4096]) {
            Ok(length) => length > 0,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        };
        parting.retain(|(since, connection)| {
            since.elapsed() < LINGER_PAUSE && is_open(&mut &connection.socket)
        });
    }
}

impl Server {
    /// Serves a connection in a thread of its own, if there may be one more and the thread can be had.
    fn converse_in_thread(self: &Arc<Server>, connection: Arc<Connection>) -> bool {
        // Each connection's thread holds the server, as does the accepting one.
        let room = Arc::strong_count(self) <= self.config.max_connections;
        let server = self.clone();
        room && thread_builder()
            .spawn(move || server.converse(&connection))
            .is_ok()
    }

    /// The requests of a connection, one after the other.
    fn converse(&self, connection: &Arc<Connection>) {
        let mut input = Connection::input(connection);
        input.get_mut().deadline = Some(Instant::now() + REQUEST_TIME);
        while let Some(mut next) = self.exchange(connection, input) {
            next.get_mut().deadline = Some(Instant::now() + IDLE_TIME);
            if next.fill_buf().map_or(true, <[u8]>::is_empty) {
                return;
            }
            next.get_mut().deadline = Some(Instant::now() + REQUEST_TIME);
            input = next;
        }
    }

    /// A request and its answer. Gives the input back where another request may follow.
    fn exchange(
        &self,
        connection: &Connection,
        mut input: BufReader<Input>,
    ) -> Option<BufReader<Input>> {
        let mut request = Request::default();
        match self.check(connection, &mut request, &mut input) {
            Err(Refusal::Gone) => None,
            Err(refusal) => self.refuse(connection, request, Some(input), &refusal),
            Ok(Wanted::Page) => self.reply(connection, request, Some(input), false, |answer| {
                answer.page()
            }),
            Ok(Wanted::Options(methods)) => {
                self.reply(connection, request, Some(input), false, |answer| {
                    answer.options(methods)
                })
            }
            Ok(Wanted::Run(words)) => self.run(connection, request, input, &words),
        }
    }

    /// Reads a request and checks it, in the order in which refusals take precedence.
    fn check(
        &self,
        connection: &Connection,
        request: &mut Request,
        input: &mut BufReader<Input>,
    ) -> Result<Wanted, Refusal> {
        let policy = &self.config.policy;
        request.read(input)?;
        request.expectation()?;
        policy.host(request, connection.local)?;
        let (path, method) = (request.path.as_str(), request.method.as_str());
        let reads_page = path == "/" && matches!(method, "GET" | "HEAD");
        if !reads_page {
            policy.browser(request)?;
        }
        let methods = match path {
            "/" => PAGE_METHODS,
            "/run" | "*" => RUN_METHODS,
            _ => return Err(Refusal::NoSuchPath),
        };
        match (path, method) {
            (_, "OPTIONS") => return Ok(Wanted::Options(methods)),
            ("/", "GET" | "HEAD") => return Ok(Wanted::Page),
            ("/run", "GET" | "HEAD" | "POST") => {}
            (_, "GET" | "HEAD" | "POST") => return Err(Refusal::Method(methods)),
            _ => return Err(Refusal::UnknownMethod),
        }
        policy.token(request)?;
        if request.field("last-event-id").is_some() {
            return Err(Refusal::Repeated);
        }
        let query = request.query.clone().unwrap_or_default().into_bytes();
        let in_content = request.method == "POST" && form_value(&query, "command")?.is_none();
        let form = if in_content {
            self.read_form(connection, request, input)?
        } else {
            query
        };
        policy.command(&form).map(Wanted::Run)
    }

    /// Content that is a form.
    fn read_form(
        &self,
        connection: &Connection,
        request: &mut Request,
        input: &mut BufReader<Input>,
    ) -> Result<Vec<u8>, Refusal> {
        let content = &mut request.content;
        if content
            .known_length()
            .is_some_and(|length| length > LARGEST_FORM as u64)
        {
            return Err(Refusal::FormTooLarge);
        }
        if std::mem::take(&mut request.awaits_continue) && !self.write(connection, CONTINUE) {
            return Err(Refusal::Gone);
        }
        input.get_mut().deadline = Some(Instant::now() + REQUEST_TIME);
        let mut form = Vec::new();
        loop {
            let piece = content.next(input)?;
            if piece.is_empty() {
                return Ok(form);
            }
            let length = piece.len();
            form.extend_from_slice(piece);
            content.take(input, length);
            if form.len() > LARGEST_FORM {
                return Err(Refusal::FormTooLarge);
            }
        }
    }

    /// Runs a command and streams it.
    fn run(
        &self,
        connection: &Connection,
        mut request: Request,
        input: BufReader<Input>,
        words: &[Vec<u8>],
    ) -> Option<BufReader<Input>> {
        let format = Format {
            events: wants_events(&request),
            chunked: request.minor > 0,
        };
        if request.method == "HEAD" {
            return self.reply(connection, request, Some(input), false, |answer| {
                answer.stream(format)
            });
        }
        if request.content.begins_malformed(input.buffer()) {
            return self.refuse(
                connection,
                request,
                Some(input),
                &Refusal::Malformed("malformed chunk"),
            );
        }
        // Counted before the signals are looked at: a server that ends sees the count, or this sees that it ends.
        let _counted = Counted::new(&self.runs);
        if sys::signals() > 0 {
            return self.refuse(
                connection,
                request,
                Some(input),
                &Refusal::Busy("the server is shutting down"),
            );
        }
        let mut kept = Some(input);
        let feed = if request.method == "POST" && !request.content.is_at_end() {
            let content = std::mem::take(&mut request.content);
            kept.take().map(|input| Feed { input, content })
        } else {
            None
        };
        let child = match Child::start(words, &self.null, feed) {
            Ok(child) => child,
            Err((failure, feed)) => {
                if let Some(feed) = feed {
                    (kept, request.content) = (Some(feed.input), feed.content);
                }
                return self.report_failure(connection, request, kept, failure, format);
            }
        };
        let line = Line::new("run")
            .value("peer", &connection.peer)
            .value("pid", child.pid());
        line.text("command", &words.join(&b' ')).write();
        let close = request.wants_close();
        let mut head = if request.awaits_continue {
            CONTINUE.to_vec()
        } else {
            Vec::new()
        };
        head.extend(self.answer(&request, close).stream(format));
        let client = Client {
            socket: &connection.socket,
            peer: &connection.peer,
            format,
        };
        let ended = run::stream(child, &client, &self.config.limits, head);
        if !ended.complete {
            return None;
        }
        if let Some(feed) = ended.feed {
            (kept, request.content) = (Some(feed.input), feed.content);
        }
        leave_or_go_on(connection, &mut request, kept, close)
    }

    /// A command that could not be started: a refusal, or an event stream that says so.
    fn report_failure(
        &self,
        connection: &Connection,
        request: Request,
        input: Option<BufReader<Input>>,
        failure: Failure,
        format: Format,
    ) -> Option<BufReader<Input>> {
        let (code, why) = match &failure {
            Failure::NoProgram(why) if format.events => (127, why),
            Failure::CannotRun(why) if format.events => (126, why),
            _ => return self.refuse(connection, request, input, &failure.into()),
        };
        let line = Line::new("exit")
            .value("peer", &connection.peer)
            .value("out", "failed")
            .value("code", code);
        line.text("why", why.as_bytes()).write();
        self.reply(connection, request, input, false, |answer| {
            run::failed_stream(code, why, format, answer.stream(format))
        })
    }

    fn refuse(
        &self,
        connection: &Connection,
        request: Request,
        input: Option<BufReader<Input>>,
        refusal: &Refusal,
    ) -> Option<BufReader<Input>> {
        log_refusal(connection, &request.target, refusal);
        self.reply(
            connection,
            request,
            input,
            refusal.breaks_framing(),
            |answer| answer.refusal(refusal),
        )
    }

    /// Answers without having read the request's content.
    fn reply(
        &self,
        connection: &Connection,
        mut request: Request,
        input: Option<BufReader<Input>>,
        framing_is_lost: bool,
        write: impl FnOnce(&Answer) -> Vec<u8>,
    ) -> Option<BufReader<Input>> {
        let too_much = request
            .content
            .known_length()
            .is_some_and(|length| length > MOST_SKIPPED);
        // Whether a client that was not told to go on sends its content all the same cannot be known.
        let close = framing_is_lost || too_much || request.awaits_continue || request.wants_close();
        let answer = self.answer(&request, close);
        if !self.write(connection, &write(&answer)) {
            return None;
        }
        leave_or_go_on(connection, &mut request, input, close)
    }

    fn answer<'a>(&self, request: &'a Request, close: bool) -> Answer<'a> {
        let foreign_origin = self.config.policy.foreign_origin(request);
        Answer {
            close,
            head_only: request.method == "HEAD",
            foreign_origin,
        }
    }

    /// Writes an answer whole, unless the client is gone or does not read.
    fn write(&self, connection: &Connection, mut bytes: &[u8]) -> bool {
        let deadline = Instant::now() + self.config.limits.stall;
        while !bytes.is_empty() {
            match (&connection.socket).write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
                {
                    if Instant::now() >= deadline {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Waits for the commands to end, which they do by themselves once a signal has come.
    fn wait_for_runs(&self) {
        let mut deadline = Instant::now() + self.config.limits.grace + AFTER_GRACE;
        while self.runs.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            if sys::signals() > 1 {
                deadline = deadline.min(Instant::now() + AFTER_SECOND_SIGNAL);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Goes on to the next request past what is left of this one, or takes leave of the client.
fn leave_or_go_on(
    connection: &Connection,
    request: &mut Request,
    input: Option<BufReader<Input>>,
    close: bool,
) -> Option<BufReader<Input>> {
    if let Some(mut input) = input.filter(|_| !close && sys::signals() == 0) {
        input.get_mut().deadline = Some(Instant::now() + REQUEST_TIME);
        if skip(&mut request.content, &mut input) {
            return Some(input);
        }
    }
    linger(&connection.socket);
    None
}

/// Reads what is left of a request's content, if that is not too much.
fn skip(content: &mut Content, input: &mut BufReader<Input>) -> bool {
    let mut skipped = 0;
    while skipped <= MOST_SKIPPED {
        match content.next(input).map(<[u8]>::len) {
            Ok(0) => return true,
            Ok(length) => content.take(input, length),
            Err(_) => return false,
        }
        skipped += input.capacity() as u64;
    }
    false
}

/// Says that nothing more comes, and reads what still does: closing a socket with unread input would send a reset, which can eat
/// the answer on its way (RFC 9112 section 9.6).
fn linger(mut socket: &TcpStream) {
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.set_read_timeout(Some(LINGER_PAUSE));
    let deadline = Instant::now() + LINGER;
    while Instant::now() < deadline && socket.read(&mut [0; 4096]).is_ok_and(|length| length > 0) {}
}

/// Events, unless plain text is asked for and they are not (RFC 9110 section 12.5.1).
fn wants_events(request: &Request) -> bool {
    request.lists("accept", "text/event-stream") || !request.lists("accept", "text/plain")
}

fn log_refusal(connection: &Connection, target: &str, refusal: &Refusal) {
    let (status, why) = response::explain(refusal);
    let line = Line::new("refuse")
        .value("peer", &connection.peer)
        .value("status", &status[..3]);
    line.text("target", target.as_bytes())
        .text("why", why.as_bytes())
        .write();
}

/// Adds one to a counter for as long as it lives, however its owner ends.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicUsize) -> Counted<'a> {
        counter.fetch_add(1, Ordering::SeqCst);
        Counted(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
