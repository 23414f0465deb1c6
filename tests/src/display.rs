//! The display of a gpu backend, played: it says how large it is, and keeps what is drawn on it.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::thread;

/// Pixels in a row.
pub const WIDTH: usize = 320;
/// Rows.
pub const HEIGHT: usize = 200;

/// What is on the screen.
#[derive(Debug)]
pub struct Screen {
    /// Row by row, as the backend sends them.
    pub pixels: Vec<u32>,
    /// How often something was drawn.
    pub updates: usize,
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect()
}

/// One screen for the backend that connects, as the "Vhost-user-gpu Protocol" of QEMU's interop documentation
/// has it, until the other end is closed.
///
/// # Panics
/// On its own thread, when the backend says what makes no sense.
#[must_use]
pub fn display(listener: UnixListener) -> Arc<Mutex<Screen>> {
    let screen = Arc::new(Mutex::new(Screen { pixels: vec![0; WIDTH * HEIGHT], updates: 0 }));
    let shown = Arc::clone(&screen);
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut header = [0; 12];
        while stream.read_exact(&mut header).is_ok() {
            let [request, _flags, size] = words(&header)[..] else { panic!() };
            let mut payload = vec![0; size.try_into().unwrap()];
            stream.read_exact(&mut payload).unwrap();
            let mut answer = vec![];
            match request {
                // GET_PROTOCOL_FEATURES
                1 => answer = vec![0; 8],
                // GET_DISPLAY_INFO: OK_DISPLAY_INFO, and 16 screens of which one is on.
                3 => {
                    answer = vec![0; 24 + 16 * 24];
                    for (at, value) in [(0, 0x1101), (32, WIDTH), (36, HEIGHT), (40, 1)] {
                        answer[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
                    }
                }
                // UPDATE: a rectangle of it.
                8 => {
                    let [_, left, top, width, height] = words(&payload)[..5] else { panic!() };
                    let [left, top, width, height] =
                        [left, top, width, height].map(|n| usize::try_from(n).unwrap());
                    let new = words(&payload[20..]);
                    assert_eq!(new.len(), width * height);
                    let mut screen = shown.lock().unwrap();
                    for (row, line) in new.chunks_exact(width).enumerate() {
                        let at = (top + row) * WIDTH + left;
                        screen.pixels[at..at + width].copy_from_slice(line);
                    }
                    screen.updates += 1;
                }
                _ => {}
            }
            if !answer.is_empty() {
                let size = u32::try_from(answer.len()).unwrap();
                let header: Vec<u8> = [request, 4, size].into_iter().flat_map(u32::to_ne_bytes).collect();
                stream.write_all(&[header, answer].concat()).unwrap();
            }
        }
    });
    screen
}
