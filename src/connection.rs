//! The path of one connection: its requests and their answers, one after the other.

use crate::log::{self, quoted, quoted_as_sent};
use crate::pipes::{TICK, is_passing};
use crate::refusal::{self, Refusal, ensure};
use crate::request::{Form, Request, parse_form, percent_decode};
use crate::response::{CONTINUE, Context, NO_CONTENT, PAGE, PAGE_FIELDS, PLAIN, USAGE};
use crate::{output::Stream, policy::Rules, run, run::Client, sys};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// Each of three has so long, however it trickles: the first byte of a request, the rest of its
/// head, its form.
const ARRIVAL_TIME: Duration = Duration::from_secs(5);
/// How long a client may go on sending after an answer that ends the connection.
const LINGER_TIME: Duration = Duration::from_secs(2);
/// The size of the input buffer: small, since each silent stream keeps one; most heads fit into it.
const BUFFER: usize = 1 << 10;

/// Serves a client until it or the server ends the connection, or the connection fails.
pub fn serve(client: Client, rules: &Rules) -> io::Result<()> {
    let Client { socket, limits, .. } = client;
    let local = socket.local_addr()?.ip().to_canonical();
    // Each wait is a tick, so that whoever waits sees what else has happened.
    socket.set_read_timeout(Some(TICK))?;
    socket.set_write_timeout(Some(TICK))?;
    // Without it a client that keeps the connection waits for its second answer for 40 ms.
    socket.set_nodelay(true)?;
    sys::notice_dead_peer(socket, limits.heartbeat, limits.stall);
    let input = BufReader::with_capacity(BUFFER, Input { socket, deadline: Instant::now() });
    let mut connection = Connection { client, local, rules, input };
    while connection.has_request()? && connection.exchange() {}
    // Closing a socket with unread input sends a reset, which can overtake the last answer and have
    // it thrown away (RFC 9112 section 9.6). So the server says that nothing more comes, and reads
    // what still does, for a moment.
    let _ = socket.shutdown(Shutdown::Write);
    connection.allow(LINGER_TIME);
    let _ = io::copy(connection.input.get_mut(), &mut io::sink());
    Ok(())
}

struct Connection<'a> {
    client: Client<'a>,
    /// The address that it came in on.
    local: IpAddr,
    rules: &'a Rules,
    input: BufReader<Input<'a>>,
}

/// What a client sends, up to a deadline.
struct Input<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        try_until(self.deadline, || self.socket.read(buffer))
    }
}

/// Repeats a call that waits for a tick, until it has done something or failed. Fails with
/// `TimedOut` once the deadline has passed, and when the server ends with the call's own error.
fn try_until(deadline: Instant, mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    while Instant::now() < deadline {
        match call() {
            Err(error) if is_passing(&error) && !sys::is_ending() => {}
            done => return done,
        }
    }
    Err(ErrorKind::TimedOut.into())
}

impl Connection<'_> {
    /// Lets the client send for `time` from now.
    fn allow(&mut self, time: Duration) {
        self.input.get_mut().deadline = Instant::now() + time;
    }

    /// Waits for a request to begin, or the client to end. What has begun has as much time again to
    /// arrive.
    fn has_request(&mut self) -> io::Result<bool> {
        self.allow(ARRIVAL_TIME);
        let has_begun = !self.input.fill_buf()?.is_empty();
        self.allow(ARRIVAL_TIME);
        Ok(has_begun)
    }

    /// A request and its answer. Returns whether another request may follow.
    fn exchange(&mut self) -> bool {
        let mut request = Request::default();
        // It is refused, or was answered, or nobody is there to be answered.
        let answered = match self.answer(&mut request) {
            Err(why) if why != refusal::GONE => self.refuse(&request, &why),
            answered => answered,
        };
        answered.is_ok() && !request.ends_connection() && !sys::is_ending()
    }

    /// Reads a request into an empty one, and answers it, unless it is refused.
    fn answer(&mut self, request: &mut Request) -> Result<(), Refusal> {
        request.read(&mut self.input)?;
        self.rules.check_caller(request, self.local)?;
        let context = Context { request, rules: self.rules };
        let (path, _) = request.path_and_query();
        // The rules let no other method or path pass.
        let answer = match (request.method.as_str(), path) {
            ("OPTIONS", "/run") => context.head(NO_CONTENT, "Allow: GET, HEAD, POST, OPTIONS\r\n"),
            ("OPTIONS", _) => context.head(NO_CONTENT, "Allow: GET, HEAD, OPTIONS\r\n"),
            (_, "/run") => return self.run(request),
            (_, "/commands") => context.whole("200 OK", PLAIN, self.rules.listed().as_bytes()),
            _ if request.accepts("text/html") => context.whole("200 OK", PAGE_FIELDS, PAGE),
            _ => context.whole("200 OK", PLAIN, USAGE.as_bytes()),
        };
        self.write(&answer)
    }

    /// Runs a command, which is in the query, or in the content, a form.
    fn run(&mut self, request: &mut Request) -> Result<(), Refusal> {
        let (_, query) = request.path_and_query();
        let query = parse_form(query.as_bytes());
        if request.is_reconnect() || query.as_ref().is_ok_and(|query| query.is_reconnect) {
            // It tells an `EventSource` to stop (WHATWG HTML section 9.2.3).
            return self.write(&Context { request, rules: self.rules }.head(NO_CONTENT, ""));
        }
        let mut command = query?.command;
        if request.method == "POST" && command.is_none() {
            command = self.read_form(request)?.command;
        }
        let command = command.ok_or(refusal::COMMAND)?;
        let words = self.rules.admit(&command)?;
        let head = Context { request, rules: self.rules }.stream_head();
        if request.method == "HEAD" {
            return self.write(&head);
        }
        // Content that was not the form is the command's standard input: first what came with the
        // head and is in the buffer (from where it is copied: no request follows it), then the
        // socket's.
        let length = request.content_length;
        let is_fed = request.method == "POST" && request.form.is_empty() && length > 0;
        let interim = if is_fed && request.expects_continue() { CONTINUE } else { "" };
        let (is_events, is_chunked) = (request.wants_events(), request.minor_version > 0);
        let stream = Stream::new(is_events, is_chunked, [interim.as_bytes(), &head].concat());
        let content = self.input.buffer().chain(self.client.socket).take(length);
        let content = if is_fed { Some(content) } else { None };
        let text = quoted_as_sent(&command, &words.join(&b' '));
        match run::run(&text, &words, content, self.client, stream) {
            // There is no such program (404), or it cannot be run (403): as events, a stream that
            // says so.
            Err(refusal) if is_events && matches!(refusal.status, 403 | 404) => {
                self.fail(&refusal, &text, Stream::new(true, is_chunked, head))
            }
            done => done,
        }
    }

    /// Reads the form that holds the command.
    fn read_form(&mut self, request: &mut Request) -> Result<Form, Refusal> {
        request.check_form()?;
        if request.expects_continue() {
            self.write(CONTINUE.as_bytes())?;
        }
        self.allow(ARRIVAL_TIME);
        let length = request.content_length;
        (&mut self.input).take(length).read_to_end(&mut request.form)?;
        ensure(request.form.len() as u64 == length, refusal::CUT)?;
        parse_form(&request.form)
    }

    /// Sends the whole stream of a command that could not be started.
    fn fail(&self, why: &Refusal, command: &str, mut stream: Stream) -> Result<(), Refusal> {
        // By what a shell says so (XCU 2.8.2).
        let code = if why.status == 404 { 127 } else { 126 };
        stream.event("err", "", why.text.as_bytes());
        let numbers = stream.exit("failed", Some(code), None, 0);
        let (peer, why) = (self.client.peer, quoted(why.text.as_bytes()));
        let asked = format!("peer={peer} pid=0 command={command}");
        log::line(format_args!("exit {asked} out=failed{numbers} why={why}"));
        self.write(&stream.unsent)
    }

    /// Refuses a request, and logs what was asked for: by the target, or by the form that was read.
    fn refuse(&self, request: &Request, refusal: &Refusal) -> Result<(), Refusal> {
        let (peer, status) = (self.client.peer, refusal.status);
        let target = request.target.as_bytes();
        let mut asked = quoted_as_sent(target, &percent_decode(target).0);
        if !request.form.is_empty() {
            let form = percent_decode(&request.form).0;
            let command = quoted(form.strip_prefix(b"command=").unwrap_or(&form));
            asked += &format!(" command={command}");
        }
        let (why, _) = refusal.text.split_once("; ").unwrap_or_default();
        let why = quoted(why.as_bytes());
        log::line(format_args!("refuse peer={peer} status={status} target={asked} why={why}"));
        self.write(&Context { request, rules: self.rules }.refusal(refusal))
    }

    /// Writes an answer whole, unless the client is gone, or does not read.
    fn write(&self, mut bytes: &[u8]) -> Result<(), Refusal> {
        let Client { mut socket, limits, .. } = self.client;
        while !bytes.is_empty() {
            let written = try_until(Instant::now() + limits.stall, || socket.write(bytes));
            let length = written.map_err(|_| refusal::GONE)?;
            bytes = &bytes[length..];
        }
        Ok(())
    }
}
