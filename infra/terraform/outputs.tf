output "store" {
  description = "VC2_STORE."
  value       = trimsuffix("s3://${aws_s3_bucket.store.bucket}/${var.prefix}", "/")
}

output "roles" {
  description = "ARN of each role: for eks.amazonaws.com/role-arn of the service accounts of infra/kubernetes, or for AWS_ROLE_ARN."
  value       = { for name, role in aws_iam_role.this : name => role.arn }
}
