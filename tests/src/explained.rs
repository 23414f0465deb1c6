//! What the program says when it cannot do something.

use crate::launch::Ended;

/// One sentence on standard error, its causes, at most one hint; each a line; and nothing else anywhere.
///
/// # Panics
/// When it said anything else, or ended with another code.
pub fn assert_explained(ended: Ended, code: i32, sentence: &str, cause: &str, hint: &str) {
    let ended = ended.with_code(code);
    assert_eq!(ended.console, "", "nothing on standard output\n{ended}");
    let lines: Vec<_> = ended.log.lines().collect();
    assert!(lines[0].starts_with("outboard: "), "{ended}");
    assert!(lines[0].contains(sentence), "sentence {sentence:?}\n{ended}");
    let causes: Vec<_> =
        lines[1..].iter().take_while(|line| line.starts_with("  because: ")).copied().collect();
    assert!(causes.join("\n").contains(cause), "cause {cause:?}\n{ended}");
    let rest = &lines[1 + causes.len()..];
    assert!(rest.len() <= 1, "more than a sentence, causes and a hint\n{ended}");
    let given = rest.first().map_or("", |line| line.strip_prefix("  hint: ").expect("a hint"));
    assert!(given.contains(hint) && given.is_empty() == hint.is_empty(), "hint {hint:?}\n{ended}");
    for line in &lines {
        assert!(!line.ends_with('.'), "clauses, no full stop\n{ended}");
    }
    for (n, line) in causes.iter().enumerate() {
        let text = line.strip_prefix("  because: ").unwrap();
        assert!(!lines[..=n].iter().any(|before| before.contains(text)), "a cause is repeated\n{ended}");
    }
}
