//! `mlx-node config apply` and `drain`: what an administrator asks of a running endpoint's process.
#![expect(clippy::print_stdout, reason = "what the commands print is their result")]

use crate::{
    config::Values,
    endpoint::{AskError, Endpoint},
    status::list,
};
use serde_json::Value;

/// `config apply`: has the settings read again, and says what came of it.
pub(crate) async fn reload(values: &Values, json: bool) -> Result<(), AskError> {
    let answer = Endpoint::to_administer(values)?.post_whole("/v1/admin/reload").await?;
    if json {
        println!("{answer}");
    } else {
        print!("{}", told(&answer));
    }
    Ok(())
}

/// `drain`: has the process finish and end.
pub(crate) async fn drain(values: &Values) -> Result<(), AskError> {
    let endpoint = Endpoint::to_administer(values)?;
    endpoint.post_whole("/v1/admin/drain").await?;
    println!("{} finishes what runs and ends", endpoint.url());
    Ok(())
}

fn told(answer: &Value) -> String {
    let names = |field: &str| list(&answer[field]).filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    let (applied, restart) = (names("applied"), names("restart"));
    let mut told = match applied.as_str() {
        "" => "nothing has changed that can be taken over\n".to_owned(),
        applied => format!("taken over: {applied}\n"),
    };
    if !restart.is_empty() {
        told.push_str(&format!("after a restart: {restart}\n"));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_taken_over_and_what_not() {
        let check = |answer: Value, expected: &str| assert_eq!(told(&answer), expected);
        check(
            json!({"applied": ["key", "log"], "restart": ["model"]}),
            "taken over: key, log\nafter a restart: model\n",
        );
        check(json!({"applied": [], "restart": []}), "nothing has changed that can be taken over\n");
    }
}
