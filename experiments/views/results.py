from django.http import HttpRequest, HttpResponse


def home(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Kangaroo")


checkpoint = delete = edit = experiment = log = metrics = metrics_csv = profile = resume = spec_json = stop = home
