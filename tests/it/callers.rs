//! Section 2, "Who may call": rebinding, other sites' pages, the token, what is allowed, and the order
//! of all checks.

use crate::requests::{ask, is_refusal, runs, shown};
use crate::support::*;
use std::net::TcpStream;

/// Asks for a run with each row's fields; `HOST` and `PORT` in them are the server's, and so is the Host
/// where none is named.
fn statuses(server: &Server, table: &[(&str, u16)]) {
    let (_, port) = server.address.rsplit_once(':').unwrap();
    for (fields, status) in table {
        let fields = fields.replace("PORT", port);
        let host = if fields.contains("Host:") { "" } else { "Host: HOST\r\n" };
        let request = format!("GET /run?command=true HTTP/1.1\r\n{host}{fields}\r\n");
        let response = ask(server, &request);
        assert_eq!(response.status, *status, "{request}{}", shown(&response));
        if *status != 200 {
            is_refusal(&response, *status, &[]);
        }
    }
}

/// A server that listens where the options say.
fn start(options: &[&str]) -> Server {
    let mut command = binary();
    command.args(options);
    Server::start_command(command)
}

/// That no page is granted anything.
fn grants_nothing(response: &Response) {
    let is_grant =
        |(name, _): &(String, String)| name.starts_with("access-control-") || name == "vary";
    assert!(!response.fields.iter().any(is_grant), "{}", shown(response));
}

/// The status of a run for this `Host`, asked at `address`.
fn status_at(address: &str, host: &str) -> u16 {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut client = Client::of(stream);
    client.write(format!("GET /run?command=true HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    client.response().status
}

#[test]
fn names_that_can_only_mean_this_server() {
    let server = Server::start(&[]);
    statuses(
        &server,
        &[
            ("Host: HOST\r\n", 200),
            ("Host: 127.0.0.1\r\n", 200),
            ("Host: 127.0.0.1:1\r\n", 200),
            ("Host: localhost\r\n", 200),
            ("Host: localhost:PORT\r\n", 200),
            ("Host: LocalHost.\r\n", 200),
            ("Host: localhost.:PORT\r\n", 200),
            ("Host: a.localhost\r\n", 200),
            ("Host: A.b.LocalhosT.:PORT\r\n", 200),
            ("Host: localhost..\r\n", 421),
            ("Host: notlocalhost\r\n", 421),
            ("Host: localhost.evil.test\r\n", 421),
            ("Host: localhost-evil.test\r\n", 421),
            ("Host: 127.0.0.1.nip.io\r\n", 421),
            ("Host: evil.test:PORT\r\n", 421),
            ("Host: 0.0.0.0:PORT\r\n", 421),
            ("Host: 127.0.0.2\r\n", 421),
            // What other parsers take for the same address is a name here.
            ("Host: 127.1\r\n", 421),
            ("Host: 2130706433\r\n", 421),
            ("Host: 0x7f.0.0.1\r\n", 421),
            ("Host: 127.0.0.01\r\n", 421),
            ("Host: 0177.0.0.1\r\n", 421),
            ("Host: [::1]\r\n", 421),
            ("Host: [::ffff:127.0.0.2]:PORT\r\n", 421),
        ],
    );
    // A name may mean another host: the address does not, or a token tells who asks.
    for path in ["/run?command=true", "/", "/commands", "/none"] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: evil.test\r\n\r\n");
        let response = ask(&server, &request);
        is_refusal(&response, 421, &["127.0.0.1", "token"]);
    }
    let old = server.send("GET /run?command=true HTTP/1.0\r\n\r\n");
    assert_eq!(old.status, 200);
    let old = server.send("GET /run?command=true HTTP/1.0\r\nHost: evil.test\r\n\r\n");
    assert_eq!(old.status, 421);
}

/// The very address that the connection came in on, of the many that are listened on.
#[test]
fn names_where_all_addresses_are_listened_on() {
    let server = start(&["--listen", "0.0.0.0:0", "--no-token"]);
    let (_, port) = server.address.rsplit_once(':').unwrap();
    for (at, host, status) in [
        ("127.0.0.1", "127.0.0.1", 200),
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "127.0.0.2", 421),
        ("127.0.0.1", "0.0.0.0", 421),
        ("127.0.0.2", "127.0.0.2", 200),
        ("127.0.0.2", "localhost", 200),
        ("127.0.0.2", "127.0.0.1", 421),
    ] {
        let found = status_at(&format!("{at}:{port}"), host);
        assert_eq!(found, status, "{host} at {at}");
    }
}

#[test]
fn names_on_ipv6() {
    let server = start(&["--listen", "[::1]:0"]);
    for (host, status) in [
        ("[::1]", 200),
        ("[::1]:5", 200),
        ("[0:0:0:0:0:0:0:1]:5", 200),
        ("localhost", 200),
        ("127.0.0.1", 421),
        ("[::2]", 421),
        ("[::]", 421),
    ] {
        assert_eq!(status_at(&server.address, host), status, "{host}");
    }
    for host in ["::1", "[::1", "[::1]x", "[::1%lo]", "[localhost]"] {
        let status = status_at(&server.address, host);
        assert!([400, 421].contains(&status), "{host}: {status}");
    }
    // There IPv4 comes in as IPv6, in its mapped form.
    let both = start(&["--listen", "[::]:0", "--no-token"]);
    let (_, port) = both.address.rsplit_once(':').unwrap();
    for (host, status) in [
        ("127.0.0.1", 200),
        ("localhost", 200),
        ("[::ffff:127.0.0.1]", 200),
        ("127.0.0.2", 421),
        ("[::1]", 421),
        ("[::]", 421),
    ] {
        let found = status_at(&format!("127.0.0.1:{port}"), host);
        assert_eq!(found, status, "{host}");
    }
}

#[test]
fn other_sites_pages_are_refused() {
    let server = Server::start(&[]);
    statuses(
        &server,
        &[
            ("Origin: http://HOST\r\n", 200),
            // With an Origin, what else a browser says does not count.
            (
                "Origin: http://HOST\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nUser-Agent: Mozilla/5.0\r\n",
                200,
            ),
            ("Host: localhost:PORT\r\nOrigin: http://localhost:PORT\r\n", 200),
            ("Origin: https://HOST\r\n", 403),
            ("Origin: HTTP://HOST\r\n", 403),
            ("Origin: http://HOST/\r\n", 403),
            ("Origin: http://localhost:PORT\r\n", 403),
            ("Origin: http://evil.test\r\n", 403),
            ("Origin: http://127.0.0.1\r\n", 403),
            ("Origin: http://127.0.0.1:1\r\n", 403),
            ("Origin: null\r\n", 403),
            ("Origin: *\r\n", 403),
            ("Origin:\r\n", 403),
            ("Origin: http://HOST\r\nOrigin: http://HOST\r\n", 403),
            ("Origin: http://HOST\r\nOrigin: http://evil.test\r\n", 403),
            ("Origin: http://HOST http://evil.test\r\n", 403),
            ("Sec-Fetch-Site: same-origin\r\n", 200),
            ("Sec-Fetch-Site: none\r\n", 200),
            ("Sec-Fetch-Site: same-site\r\n", 403),
            ("Sec-Fetch-Site: cross-site\r\n", 403),
            ("Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site\r\n", 403),
            ("Sec-Fetch-Site:\r\n", 403),
            ("Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\n", 403),
            ("Sec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: navigate\r\n", 403),
            ("Sec-Fetch-Mode: navigate\r\n", 403),
            (
                "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: cors\r\nUser-Agent: Mozilla/5.0\r\n",
                200,
            ),
            ("User-Agent: Mozilla/5.0 (X11)\r\n", 403),
            ("User-Agent: curl/8.0\r\n", 200),
            ("User-Agent: not Mozilla/5.0\r\n", 200),
            ("User-Agent:\r\n", 200),
        ],
    );
    // A POST is asked the same; a form is what other sites' pages can send.
    for fields in ["Origin: http://evil.test", "Sec-Fetch-Site: cross-site"] {
        let form = format!(
            "POST /run HTTP/1.1\r\nHost: HOST\r\n{fields}\r\nContent-Length: 12\r\n\r\ncommand=true"
        );
        is_refusal(&ask(&server, &form), 403, &[]);
    }
    // What is refused says which way is open.
    for (fields, words) in [
        ("Origin: https://ops.example\r\n", &["https://ops.example", "--allow-origin"][..]),
        ("Sec-Fetch-Site: cross-site\r\n", &["--allow-origin"]),
        ("Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\n", &["/#"]),
        // A link in a mail that is read in a browser.
        ("Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n", &["/#"]),
        ("User-Agent: Mozilla/5.0\r\n", &["User-Agent", "token"]),
    ] {
        let response = server.get("/run?command=true", fields);
        is_refusal(&response, 403, words);
        grants_nothing(&response);
    }
}

/// Links to the page work, and show nothing that runs by itself.
#[test]
fn the_page_is_for_whoever_comes_by_a_link() {
    let server = Server::start(&[]);
    let browser = "Accept: text/html\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nUser-Agent: Mozilla/5.0\r\n";
    for origin in ["", "Origin: null\r\n", "Origin: http://evil.test\r\n"] {
        let page = server.get("/", &format!("{browser}{origin}"));
        assert_eq!(page.status, 200);
        assert!(page.text().starts_with("<!doctype html>"));
        grants_nothing(&page);
        // The head that GET gets.
        let mut client = server.connect();
        let host = &server.address;
        client.write(format!("HEAD / HTTP/1.1\r\nHost: {host}\r\n{browser}{origin}\r\n"));
        assert_eq!(client.head().status, 200);
    }
}

#[test]
fn an_allowed_origin_may_read() {
    let folder = Folder::new();
    let file = folder.write("token", "secret\n");
    let options = ["--allow-origin", "https://ops.example", "--allow-origin=http://b.example:8"];
    let server = Server::start(&options);
    let locked = Server::start(&[&options[..], &["--token-file", &file]].concat());
    for origin in ["https://ops.example", "http://b.example:8"] {
        let origin_field = format!("Origin: {origin}\r\n");
        let grant = |response: &Response, status| {
            assert_eq!(response.status, status, "{}", shown(response));
            let granted = response.field("access-control-allow-origin");
            assert_eq!(granted, Some(origin), "{}", shown(response));
            assert_eq!(response.field("vary"), Some("Origin"), "{}", shown(response));
        };
        // A page has to be able to read why it was refused, and that it need not reconnect.
        for (target, fields, status) in [
            ("/run?command=true", "", 200),
            ("/run?command=true", "Accept: text/plain\r\n", 200),
            ("/run?command=nonesuch", "Accept: text/plain\r\n", 404),
            ("/run?command=true", "Last-Event-ID: 1\r\n", 204),
            ("/run", "", 400),
            ("/commands", "", 200),
            ("/none", "", 404),
        ] {
            grant(&server.get(target, &format!("{origin_field}{fields}")), status);
        }
        grant(&locked.get("/run?command=true", &origin_field), 401);
        grant(&locked.get("/commands", &origin_field), 401);
        // A preflight never bears a token.
        for server in [&server, &locked] {
            for target in ["/run", "/commands", "/run?command=true"] {
                let response = ask(
                    server,
                    &format!(
                        "OPTIONS {target} HTTP/1.1\r\nHost: HOST\r\n{origin_field}Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n\r\n"
                    ),
                );
                grant(&response, 204);
                let methods = response.field("access-control-allow-methods");
                assert_eq!(methods, Some("GET, POST"));
                let fields = response.field("access-control-allow-headers");
                assert_eq!(fields, Some("Authorization, Content-Type, Last-Event-ID"));
            }
        }
    }
    // Compared as a string.
    for origin in [
        "https://ops.example.evil.test",
        "https://ops.example:443",
        "https://ops.example/",
        "HTTPS://ops.example",
        "http://ops.example",
        "http://b.example",
        "https://ops.example, http://b.example:8",
        "null",
        "*",
    ] {
        for method in ["GET", "OPTIONS"] {
            let response = ask(
                &server,
                &format!(
                    "{method} /run?command=true HTTP/1.1\r\nHost: HOST\r\nOrigin: {origin}\r\n\r\n"
                ),
            );
            is_refusal(&response, 403, &[]);
            grants_nothing(&response);
        }
    }
    // Its own pages need no grant.
    let own = format!("Origin: http://{}\r\n", server.address);
    let own = server.get("/run?command=true", &own);
    assert_eq!(own.status, 200);
    grants_nothing(&own);
    let any = Server::start(&["--allow-origin", "*", "--no-token"]);
    let other = any.get("/run?command=true", "Origin: https://x.example\r\n");
    let granted = other.field("access-control-allow-origin");
    assert_eq!((other.status, granted), (200, Some("https://x.example")));
    let null = any.get("/run?command=true", "Origin: null\r\n");
    assert_eq!(null.status, 403);
}

#[test]
fn a_token_is_asked_for() {
    let folder = Folder::new();
    let file = folder.write("token", "s3cret-t0ken\nother line\n");
    let server = Server::start(&["--token-file", &file]);
    let bearer = "Authorization: Bearer s3cret-t0ken\r\n";
    let with = |fields: &str| format!("{fields}{bearer}");
    statuses(
        &server,
        &[
            ("", 401),
            (bearer, 200),
            ("authorization: bearer   s3cret-t0ken\r\n", 200),
            ("Authorization: Bearer s3cret-t0keN\r\n", 401),
            ("Authorization: Bearer s3cret-t0ke\r\n", 401),
            ("Authorization: Bearer s3cret-t0kenx\r\n", 401),
            ("Authorization: Bearer other line\r\n", 401),
            ("Authorization: Bearer\r\n", 401),
            ("Authorization: Bearer \r\n", 401),
            ("Authorization:\r\n", 401),
            ("Authorization: s3cret-t0ken\r\n", 401),
            ("Authorization: Basic s3cret-t0ken\r\n", 401),
            ("Authorization: Bearers3cret-t0ken\r\n", 401),
            ("X-Authorization: Bearer s3cret-t0ken\r\n", 401),
            ("Cookie: token=s3cret-t0ken\r\n", 401),
            (&format!("{bearer}{bearer}"), 401),
            // Rules 1 and 4 are skipped, 2 and 3 are not.
            (&with("Host: any.name\r\n"), 200),
            (&with("User-Agent: Mozilla/5.0\r\n"), 200),
            (&with("Host: a.b\r\nOrigin: http://a.b\r\n"), 200),
            (&with("Origin: http://evil.test\r\n"), 403),
            (&with("Origin: null\r\n"), 403),
            (&with("Sec-Fetch-Site: cross-site\r\n"), 403),
            (&with("Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\n"), 403),
            // Without the token they are skipped too, so that the answer says what is missing.
            ("Host: any.name\r\nUser-Agent: Mozilla/5.0\r\n", 401),
        ],
    );
    // Every GET, HEAD and POST of both.
    let form = "Content-Length: 12\r\n\r\ncommand=true";
    for (request, rest) in [
        ("GET /run?command=true", "\r\n"),
        ("GET /run?command=s3cret", "\r\n"),
        ("GET /run", "\r\n"),
        ("GET /commands", "\r\n"),
        ("HEAD /run?command=true", "\r\n"),
        ("HEAD /commands", "\r\n"),
        ("POST /run?command=true", "\r\n"),
        ("POST /run?command=cat", form),
        ("POST /run", form),
    ] {
        let mut client = server.connect();
        client.write(format!("{request} HTTP/1.1\r\nHost: a\r\n{rest}"));
        let response = if request.starts_with("HEAD") {
            client.head()
        } else {
            let response = client.response();
            is_refusal(&response, 401, &["Authorization: Bearer"]);
            response
        };
        let challenge = response.field("www-authenticate");
        assert_eq!((response.status, challenge), (401, Some("Bearer")), "{request}");
        // The same with it.
        let mut client = server.connect();
        client.write(format!("{request} HTTP/1.1\r\nHost: a\r\n{bearer}{rest}"));
        let status = client.head().status;
        assert_ne!(status, 401, "{request}");
    }
    // The page asks for it, and a preflight has none.
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: any.name\r\n", 200),
        ("HEAD / HTTP/1.1\r\nHost: any.name\r\n", 200),
        ("OPTIONS /run HTTP/1.1\r\nHost: a\r\n", 204),
        ("OPTIONS /commands HTTP/1.1\r\nHost: a\r\n", 204),
    ] {
        let mut client = server.connect();
        client.write(format!("{request}\r\n"));
        assert_eq!(client.head().status, status, "{request}");
    }
    // No variable does it: every command would have it.
    let mut command = binary();
    command.args(["--listen", "127.0.0.1:0"]);
    command.env("SSECOMMANDER_TOKEN", "s3cret-t0ken");
    let server = Server::start_command(command);
    assert_eq!(outcome(&server.run("true")), "exited:0");
}

#[test]
fn only_what_is_allowed_runs() {
    let server = Server::start(&[
        "--allow",
        "echo 'a  b'",
        "--allow",
        "printf %s *",
        "--allow",
        "ls -d '*'",
        "--allow=basename \"*\"",
        "--allow=true",
        "--allow",
        "dirname a*",
        "--allow",
        "test \\*",
    ]);
    for (command, status) in [
        // Word for word, however they are quoted.
        ("echo 'a  b'", 200),
        ("echo \"a  b\"", 200),
        ("  'echo'\ta\\ \\ b\n", 200),
        ("echo a b", 403),
        ("echo 'a  b' c", 403),
        ("echo", 403),
        // A blank and a bare star at the end admit any further arguments.
        ("printf %s", 200),
        ("printf %s x y", 200),
        ("printf '%s' '*' ''", 200),
        ("printf %d 1", 403),
        ("printf", 403),
        ("printf %sx", 403),
        // Any other star is only itself.
        ("ls -d '*'", 200),
        ("ls -d *", 200),
        ("ls -d", 403),
        ("ls -d /", 403),
        ("basename *", 200),
        ("basename x", 403),
        ("dirname 'a*'", 200),
        ("dirname a", 403),
        ("dirname ab", 403),
        ("test *", 200),
        ("test x", 403),
        ("true", 200),
        ("/bin/true", 403),
        ("TRUE", 403),
        ("true *", 403),
        ("true ''", 403),
        ("sh -c true", 403),
        ("nonesuch", 403),
    ] {
        let response = server.get(&run_target(command), "");
        assert_eq!(response.status, status, "{command}");
        if status == 403 {
            is_refusal(&response, 403, &["/commands"]);
        }
        // A form is no way around it.
        let form = format!("command={}", percent_encode(command.as_bytes()));
        let response = crate::requests::post(&server, "/run", "", &form);
        assert_eq!(response.status, status, "{command}");
    }
    // A star alone has no blank before it: it is a command of that name.
    let star = Server::start(&["--allow", "*"]);
    for command in ["true", "sh -c true", "x *"] {
        let response = star.get(&run_target(command), "");
        is_refusal(&response, 403, &["/commands"]);
    }
}

#[test]
fn refusals_take_precedence_in_order() {
    let folder = Folder::new();
    let file = folder.write("token", "secret\n");
    let allow = ["--allow", "true", "--allow", "sleep 1000"];
    let server = Server::start(&[&allow[..], &["--max-commands", "1"]].concat());
    let locked = Server::start(&[&allow[..], &["--token-file", &file]].concat());
    let _held = server.begin("sleep 1000");
    let started = runs(&server);
    let bearer = "Authorization: Bearer secret\r\n";
    let id = "Last-Event-ID: 1\r\n";
    let with_id = format!("{bearer}{id}");
    let (evil, null) = ("Host: evil.test\r\n", "Origin: null\r\n");
    let wrong = "Origin: null\r\nLast-Event-ID: 1\r\n";
    let none = "PUT /none?command='";
    // Each request is wrong in its own way and in later ones.
    let table: &[(&Server, &str, &[&str], u16)] = &[
        (&server, none, &[evil, wrong, "A b\r\n", "Transfer-Encoding: a\r\n"], 400),
        (&server, none, &[evil, wrong, "Transfer-Encoding: a\r\n"], 411),
        (&server, none, &[evil, wrong, "Content-Length: a\r\n"], 400),
        (&server, none, &[evil, wrong], 421),
        (&server, none, &[wrong], 403),
        (&server, none, &["Sec-Fetch-Site: cross-site\r\n", id], 403),
        (&server, none, &[id], 404),
        (&server, "PUT /run?command='", &[id], 501),
        (&server, "POST /?command='", &[id], 405),
        (&server, "GET /run?command='", &[null], 403),
        (&server, "GET /run?command='", &[id], 204),
        (&server, "GET /run?command=false", &[id], 204),
        (&server, "GET /run?command='", &[], 400),
        (&server, "GET /run?command=false", &[], 403),
        (&server, "GET /run?command=true", &[], 503),
        (&locked, none, &[wrong], 403),
        (&locked, none, &[id], 404),
        (&locked, "PUT /run?command='", &[id], 501),
        (&locked, "POST /commands", &[id], 405),
        (&locked, "GET /run?command='", &[id], 401),
        (&locked, "GET /run?x=1", &[id], 401),
        (&locked, "POST /run", &["Content-Type: a/b\r\nContent-Length: 70000\r\n"], 401),
        (&locked, "GET /run?command='", &[&with_id], 204),
        (&locked, "GET /run?command='", &[bearer], 400),
        (&locked, "GET /run?command=false", &[bearer], 403),
        (&locked, "GET /run?command=true", &[bearer], 200),
    ];
    for (server, line, fields, status) in table {
        let fields = fields.concat();
        let host = if fields.contains("Host:") { "" } else { "Host: HOST\r\n" };
        let response = ask(server, &format!("{line} HTTP/1.1\r\n{host}{fields}\r\n"));
        assert_eq!(response.status, *status, "{line} {fields}");
    }
    assert_eq!((runs(&server), runs(&locked)), (started, 1));
}
