//! Every span name and attribute key of the trace contract, in one place.

#![expect(missing_docs, reason = "the constants are named after their values")]

pub const TASK_ORCHESTRATION: &str = "task.orchestration";
pub const TASK_STATE_TRANSITION: &str = "task.state_transition";
pub const STEP_DISCOVERY: &str = "step.discovery";
pub const STEP_ENQUEUING: &str = "step.enqueuing";
pub const RESULT_EVALUATION: &str = "result.evaluation";
pub const STEP_EXECUTION: &str = "step.execution";
pub const STEP_STATE_TRANSITION: &str = "step.state_transition";
pub const STEP_WAIT: &str = "step.wait";
pub const HANDLER_EXECUTION: &str = "handler.execution";
pub const RESULT_SUBMISSION: &str = "result.submission";

pub const CORRELATION_ID: &str = "correlation_id";
pub const TASK_UUID: &str = "task_uuid";
pub const NAMESPACE: &str = "namespace";

pub const TASK_NAME: &str = "task_name";
pub const TEMPLATE_VERSION: &str = "template_version";
pub const PRIORITY: &str = "priority";
pub const GENERATION: &str = "generation";
pub const PARENT_CORRELATION_ID: &str = "parent_correlation_id";
pub const PARENT_TASK_UUID: &str = "parent_task_uuid";
pub const OUTCOME: &str = "outcome";
pub const FROM_STATE: &str = "from_state";
pub const TO_STATE: &str = "to_state";
pub const EVENT: &str = "event";
pub const ACTOR: &str = "actor";
pub const REASON: &str = "reason";
pub const READY_STEPS: &str = "ready_steps";
pub const RESULTS: &str = "results";
pub const LINKS_OMITTED: &str = "links_omitted";
pub const STEP_UUID: &str = "step_uuid";
pub const STEP_INDEX: &str = "step_index";
pub const STEP_NAME: &str = "step_name";
pub const HANDLER_NAME: &str = "handler_name";
pub const ATTEMPT_NUMBER: &str = "attempt_number";
pub const MAX_ATTEMPTS: &str = "max_attempts";
pub const WAIT_REASON: &str = "wait.reason";
pub const WAIT_UNTIL: &str = "wait.until";
pub const WORKER: &str = "worker";
pub const WORKER_VERSION: &str = "worker_version";
pub const LAST_HEARTBEAT_AT: &str = "last_heartbeat_at";
pub const IN_PROGRESS: &str = "in_progress";
pub const SAMPLING_REASON: &str = "sampling.reason";
pub const SAMPLING_USER_SPANS: &str = "sampling.user_spans";
pub const ERROR_TYPE: &str = "error.type";
pub const EXCEPTION: &str = "exception";
pub const EXCEPTION_TYPE: &str = "exception.type";
pub const EXCEPTION_MESSAGE: &str = "exception.message";
pub const MESSAGING_SYSTEM: &str = "messaging.system";
pub const MESSAGING_DESTINATION: &str = "messaging.destination.name";
pub const MESSAGING_OPERATION: &str = "messaging.operation.type";
pub const MESSAGING_BATCH_COUNT: &str = "messaging.batch.message_count";
pub const MESSAGING_MESSAGE_ID: &str = "messaging.message.id";
