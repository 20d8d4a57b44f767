"""URLs: only public addresses are connected to, and a server's tricks end in one line. A real
server on this machine plays the web; what lets it be reached is the `permitted` argument, what
names it is `resolve`."""

import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from auto_mmround.calibration.fetch import FetchError, fetch, is_public


def anywhere(address):
    return True


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
        ),
        *(
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "192.0.2.1",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fe80::1%eth0",
        ),
        *(
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "words",
            "",
        ),
        "2001:0:53aa:64c:0:0:80ff:fffe",  # Teredo around 127.0.0.1
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::5db8:d822"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_this_machine_is_refused_however_it_is_spelt(web, host):
    site, asked = web({"/": b"secret"})
    with pytest.raises(FetchError, match=r"not on the public internet|is unknown"):
        fetch(site.replace("127.0.0.1", host) + "/", 100)
    assert not asked


def test_the_checked_address_is_the_one_connected_to(web):
    """A name that changes its answer between check and connection (DNS rebinding) is asked only
    once."""
    site, asked = web({"/x?a=1": b"content"})
    port, questions = int(site.rpartition(":")[2]), []

    def resolve(host, port):
        questions.append(host)
        return ["127.0.0.1"] if len(questions) == 1 else ["198.51.100.1"]

    seen = []
    found = fetch(
        f"http://media.example:{port}/x?a=1",
        100,
        resolve=resolve,
        permitted=lambda a: seen.append(a) or True,
    )
    assert found == b"content" and asked == ["/x?a=1"]
    assert questions == ["media.example"] and seen == ["127.0.0.1"]


def test_one_private_address_among_public_ones_condemns_the_name():
    with pytest.raises(FetchError, match=r"is at 10\.0\.0\.1, which is not on the public internet"):
        fetch("http://media.example/", 100, resolve=lambda *_: ["93.184.216.34", "10.0.0.1"])
    with pytest.raises(FetchError, match="at no address"):
        fetch("http://media.example/", 100, resolve=lambda *_: [])


def redirect(place):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.end_headers()

    return answer


def test_redirects_are_followed_and_each_is_checked(web):
    pages = {
        "/target": b"there",
        "/a": redirect("/target"),
        "/round": redirect("/round"),
        "/nowhere": redirect(""),
    }
    pages["/in"] = redirect("http://inside.example/secret")
    pages["/file"] = redirect("file:///etc/hostname")
    site, asked = web(pages)
    port = site.rpartition(":")[2]

    def resolve(host, port):
        return {"media.example": ["127.0.0.1"], "inside.example": ["10.0.0.1"]}[host]

    def get(page):
        return fetch(
            f"http://media.example:{port}{page}", 100, resolve=resolve, permitted="127.0.0.1".__eq__
        )

    assert get("/a") == b"there"
    for page, reason in (
        ("/in", r"10\.0\.0\.1, which is not on"),
        ("/file", "only http and https"),
        ("/round", "more than 5 redirects"),
        ("/nowhere", "more than 5 redirects"),
        ("/none", "answers 404"),
    ):
        with pytest.raises(FetchError, match=reason):
            get(page)
    assert asked.count("/round") == 6


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/b",
        "file:///etc/hostname",
        "gopher://a",
        "http://",
        "http://[",
        "http://a:99999/",
        "//a",
        "x",
    ],
)
def test_other_schemes_and_broken_urls(url):
    with pytest.raises(FetchError, match=r"only http|no URL"):
        fetch(url, 100, permitted=anywhere)


def test_spaces_and_line_breaks_in_a_url_stay_in_the_path(web):
    site, asked = web({"/a%20b%0D%0AX:1": b"x"})
    assert fetch(f"{site}/a b%0D%0AX:1", 100, permitted=anywhere) == b"x"
    assert len(asked) == 1


def test_size_is_capped_while_reading(web):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "10")  # a lie
        handler.end_headers()
        handler.wfile.write(b"0123456789 and more")

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(1000):
                handler.wfile.write(bytes(1 << 20))
                sent.append(1)
        except OSError:
            pass

    site, _ = web({"/flood": flood, "/lie": endless})
    with pytest.raises(FetchError, match="larger than 2 MiB"):
        fetch(f"{site}/flood", 2 << 20, permitted=anywhere)
    assert len(sent) < 100
    assert fetch(f"{site}/lie", 100, permitted=anywhere) == b"0123456789"


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_server_that_drips_is_cut_off(web, where):
    stop = threading.Event()

    def drip(handler):
        if where == "body":
            handler.send_response(200)
            handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"H")
                if stop.wait(0.1):
                    return
        except OSError:
            pass

    site, _ = web({"/": drip})
    begun = time.monotonic()
    with pytest.raises(FetchError, match="takes longer"):
        fetch(f"{site}/", 1000, permitted=anywhere, deadline=0.5)
    stop.set()
    assert time.monotonic() - begun < 3


def test_a_server_that_hangs_up_or_talks_nonsense(web):
    site, _ = web({"/": lambda handler: handler.wfile.write(b"\x00\xff nonsense\r\n\r\n")})
    with pytest.raises(FetchError, match="failed"):
        fetch(f"{site}/", 100, permitted=anywhere)
    with pytest.raises(FetchError, match="failed"):
        fetch(f"{site}/".replace("http:", "https:"), 100, permitted=anywhere)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(FetchError, match="takes no connection"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/", 100, permitted=anywhere)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificates_are_for_the_name_that_was_asked(tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=media.example",
    ]
    command += [
        "-addext",
        "subjectAltName=DNS:media.example",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run(command, check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for _ in range(3):
            line, _ = listener.accept()
            try:
                with server.wrap_socket(line, server_side=True) as safe:
                    safe.recv(1000)
                    safe.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    mine = ssl.create_default_context(cafile=str(cert))
    port, options = (
        listener.getsockname()[1],
        {"resolve": lambda *_: ["127.0.0.1"], "permitted": anywhere},
    )
    assert fetch(f"https://media.example:{port}/", 100, context=mine, **options) == b"ok"
    with pytest.raises(FetchError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(f"https://other.example:{port}/", 100, context=mine, **options)
    with pytest.raises(FetchError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(f"https://media.example:{port}/", 100, **options)
    listener.close()
